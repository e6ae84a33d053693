"""A basis of hack directions, one small set of axes per module, and its file: safetensors, schema
``v2_with_sv``.

Tensors, for every module name as in ``model.named_modules()``::

    {name}        [K, R]   float32   the axes, orthonormal rows that point hack-ward
    _sv/{name}    [K]      float32   their singular values

Metadata (all text): ``model``, ``dtype``, ``top_k``, ``tau_axis`` and ``schema``, and what makes a
    stale file known:
``method``, ``rank`` (or ``full``), ``factors``, ``weights_sha256``, ``pairs_sha256``,
``settings_sha256``; further ``pairs``, ``groups`` and ``skipped`` (JSON lists), ``captured``, and
``votes`` (JSON: name to lists of [for, against]). Where the modules are only a part of the model's
weight matrices there is also ``coverage`` (JSON: ``share`` of the weights and the names
``left_out``), where modules are experts ``tokens`` (JSON: name of the module that holds them to the
number of tokens that came to each), and where the pairs had messages ``chat_template_sha256``.

*From the differences of one module to its axes*: ``D = G_hack − G_clean`` has few rows and many
columns, so everything goes through its Gram matrix ``K = D Dᵀ``, in float64: with ``K = P Λ Pᵀ``
the singular values are ``√Λ`` and the right singular vectors ``Λ^(−1/2) Pᵀ D``. Rows of ``D`` can
be left out by leaving rows and columns of ``K`` out, and added by adding them.

Shapes: N pairs, R coordinates of δS in a module (its rank), K axes, M directions with clean
    variance.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.files.jsonl import parse
from assay.files.storage import write_atomic
from assay.files.tensors import LONGEST_TENSORS, check_tensors
from assay.models.model import Model
from assay.vhack.directions.gradients.targets import Coverage, target_modules, weights_digest
from assay.vhack.names import BASIS
from assay.vhack.pairs.pairs import validated

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Tensors = dict[str, Tensor]

SCHEMA = BASIS
_VALUES = "_sv/"
_MOST = 1024  # axes of a module in a file: to check them takes time that grows with their cube
_SKEW = 1e-3  # largest entry of V Vᵀ − 1; what extraction writes stays below 1e-6
_REDO = (
    "extract it again (assay vhack extract), or give the model, pairs and settings it was made with"
)
_SETTINGS = ("dtype", "rank", "factors", "top_k", "tau_axis", "method")


@dataclass(frozen=True)
class Origin:
    """Model, pairs and settings of a basis.

    Attributes:
        model: Reference that the model was loaded from, for people to read.
        weights: SHA-256 in hex of the weights, from :func:`assay.vhack.weights_digest`; empty
            without a model.
        dtype: Dtype of the model, for example ``"bfloat16"``.
        rank: Number of singular directions kept per weight matrix; None stands for all of them.
        factors: Dtype of the factors U and Vh that the gradients were projected with.
        top_k: Number of axes per module that was asked for.
        tau_axis: Share of the first singular value below which axes were set to zero.
        method: Name of the method: ``"lda"`` or ``"svd"``.
        pairs: Keys of the pairs that were used, in order.
        groups: Groups of these pairs, in the same order.
        skipped: Keys of the pairs that were left out because their sides do not differ.
        captured: Share of the gradient's energy ‖g‖² that ``rank`` directions hold; 1 for all, and
            where factors were given truncated, from which it cannot be measured.
        coverage: Share of the model's weights that the modules of the basis are, and the matrices
            left out.
        tokens: Number of tokens of the pairs that came to each expert, by the name of the module
            that holds them.
        chat_template: SHA-256 of the chat template that rendered the pairs; empty where they were
            texts.
    """

    model: str = ""
    weights: str = ""
    dtype: str = ""
    rank: int | None = None
    factors: str = ""
    top_k: int = 12
    tau_axis: float = 0.0
    method: str = "lda"
    pairs: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    captured: float = 1.0
    coverage: Coverage = field(default_factory=Coverage)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    chat_template: str = ""

    @property
    def given(self) -> tuple[str, ...]:
        """Keys of all pairs it was to be made from, used or skipped, sorted."""
        return tuple(sorted(self.pairs + self.skipped))

    @property
    def pairs_digest(self) -> str:
        """SHA-256 in hex of the pairs that were given, whatever their order."""
        return hashlib.sha256("\n".join(self.given).encode()).hexdigest()

    @property
    def settings_digest(self) -> str:
        """SHA-256 in hex of the settings: dtype, rank, factors, top_k, tau_axis and method."""
        return hashlib.sha256(
            json.dumps({name: getattr(self, name) for name in _SETTINGS}).encode()
        ).hexdigest()


@dataclass(frozen=True, eq=False)
class Basis:
    """Hack directions of a model.

    Attributes:
        axes: Orthonormal rows that point hack-ward, [K, R] float32 per module name; unused rows are
            zero.
        singular_values: Singular values in falling order, [K] float32 per module name.
        votes: Numbers of pairs with a positive and with a negative component along the axis, [K, 2]
            int64 per module name.
        origin: Model, pairs and settings it was made from.

    Example:
        >>> import torch
        >>> axes = {"q_proj": torch.eye(3, 8)}
        >>> basis = Basis(axes, {"q_proj": torch.ones(3)}, {"q_proj": torch.tensor([[5, 1]] * 3)})
        >>> basis.slice(2).axes["q_proj"].shape
        torch.Size([2, 8])
    """

    axes: dict[str, Tensor]
    singular_values: dict[str, Tensor]
    votes: dict[str, Tensor]
    origin: Origin = field(default_factory=Origin)

    @property
    def undecided(self) -> list[tuple[str, int]]:
        """Module and index of every axis whose vote is a tie, so that its orientation is
        arbitrary.
        """
        return [
            (name, index)
            for name, votes_K2 in self.votes.items()
            for index in range(len(votes_K2))
            if self.axes[name][index].any() and votes_K2[index, 0] == votes_K2[index, 1]
        ]

    def slice(self, k_use: int = 5, tau_axis: float = 0.0) -> "Basis":
        """Return the basis with the first ``k_use`` axes of every module.

        Args:
            k_use: Number of axes; a module that has fewer keeps them all.
            tau_axis: Share of the first singular value below which an axis becomes zero.

        Raises:
            UsageError: ``k_use`` is below 1, or ``tau_axis`` is outside [0, 1].
        """
        check_axis_settings(k_use, tau_axis)
        axes = {
            name: zero_weak_axes(axes_KR, self.singular_values[name], tau_axis)[:k_use]
            for name, axes_KR in self.axes.items()
        }
        values = {name: values_K[:k_use] for name, values_K in self.singular_values.items()}
        votes = {name: votes_K2[:k_use] for name, votes_K2 in self.votes.items()}
        return replace(self, axes=axes, singular_values=values, votes=votes)

    def save(self, path: str | Path) -> None:
        """Write the basis as one safetensors file, replacing an older one in one step.

        Raises:
            StorageError: The file cannot be written.
        """
        tensors = {name: axes_KR.contiguous() for name, axes_KR in self.axes.items()}
        tensors |= {
            _VALUES + name: values_K.contiguous() for name, values_K in self.singular_values.items()
        }
        write_atomic(path, save(tensors, metadata=_metadata(self.votes, self.origin)))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: "Model | PreTrainedModel | None" = None,
        *,
        expect: Mapping[str, object] | None = None,
    ) -> "Basis":
        """Return the basis in a file with all its axes; :meth:`slice` takes the first of them.

        Args:
            path: Path of the file.
            model: Model that the basis must belong to, by the digest of its weights; None skips the
                check, which is right only where no model is at hand.
            expect: Attributes of :class:`Origin` that must have these values, for instance
                ``{"method": "lda"}``.

        Raises:
            DataError: The file is not a basis, or was made for other weights, pairs or settings;
                the message names which.
        """
        basis = cls(*_parse(path))
        if model is not None:
            basis.check_model(model, name=str(path))
        for name, wanted in (expect or {}).items():
            seen = getattr(basis.origin, name)
            if seen != wanted and name == "given":
                raise _stale(path, "pairs", "another set of them", "the pairs it is asked for")
            if seen != wanted:
                raise _stale(path, name, repr(seen), repr(wanted))
        return basis

    def check_model(self, model: "Model | PreTrainedModel", *, name: str = "the basis") -> None:
        """Refuse a model that this basis was not made for, by its modules and the digest of its
        weights.

        Args:
            model: Model to check.
            name: What the error calls the basis.

        Raises:
            DataError: The model has other modules or weights.
        """
        modules = target_modules(model)
        for module, axes_KR in self.axes.items():
            if module not in modules or axes_KR.shape[1] > min(modules[module].weight.shape):
                seen = f"axes of {module} with {axes_KR.shape[1]} coordinates"
                raise _stale(name, "model", seen, "the model's modules")
        digest = weights_digest(model)
        if self.origin.weights != digest:
            raise _stale(
                name, "weights", self.origin.weights[:16] or "none", f"weights {digest[:16]}"
            )

    def check_template(self, digest: str, *, name: str = "the basis") -> None:
        """Raise a DataError if another chat template rendered the pairs; an empty digest stands for
        none.
        """
        own = self.origin.chat_template
        if own and digest and own != digest:
            raise _stale(name, "chat template", own[:16], f"the chat template {digest[:16]}")


def check_axis_settings(top_k: int, tau_axis: float) -> None:
    """Raise UsageError unless ``top_k`` is at least 1 and ``tau_axis`` in [0, 1]."""
    if top_k < 1:
        raise UsageError(f"{top_k} axes", wanted="at least 1", do="ask for 1 or more with --top-k")
    if not 0 <= tau_axis <= 1:
        raise UsageError(
            f"tau_axis={tau_axis}",
            wanted="a share of the first singular value, 0 to 1",
            do="use 0.25",
        )


def zero_weak_axes(axes_KR: Tensor, values_K: Tensor, tau_axis: float) -> Tensor:
    """Return the axes with zeros in the rows where ``S_i / S_0 < tau_axis``."""
    return axes_KR * (values_K >= tau_axis * values_K[:1])[:, None]


def _metadata(votes: Tensors, origin: Origin) -> dict[str, str]:
    metadata = {name: getattr(origin, name) for name in ("model", "dtype", "method", "factors")}
    metadata |= {name: json.dumps(getattr(origin, name)) for name in ("pairs", "groups", "skipped")}
    metadata |= {name: repr(getattr(origin, name)) for name in ("top_k", "tau_axis", "captured")}
    metadata |= {
        "schema": SCHEMA,
        "rank": "full" if origin.rank is None else str(origin.rank),
        "weights_sha256": origin.weights,
        "pairs_sha256": origin.pairs_digest,
        "settings_sha256": origin.settings_digest,
        "votes": json.dumps({name: votes_K2.tolist() for name, votes_K2 in votes.items()}),
    }
    if origin.coverage.left_out:
        metadata["coverage"] = json.dumps(asdict(origin.coverage))
    if origin.tokens:
        metadata["tokens"] = json.dumps(origin.tokens)
    if origin.chat_template:
        metadata["chat_template_sha256"] = origin.chat_template
    return metadata


def read_tensors(path: str | Path, do: str) -> tuple[dict[str, str], Tensors]:
    """Return metadata and tensors of a safetensors file, or raise a DataError that says what to
    do.
    """
    try:
        check_tensors(path, LONGEST_TENSORS)
        with safe_open(path, framework="pt") as reader:
            return reader.metadata() or {}, {
                name: reader.get_tensor(name) for name in list(reader.keys())
            }
    except (SafetensorError, OSError, DataError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", wanted="a safetensors file", do=do
        ) from error


def _parse(path: str | Path) -> tuple[Tensors, Tensors, Tensors, Origin]:
    """Return the axes, singular values, votes and origin of a file."""
    metadata, tensors = read_tensors(path, _REDO)
    try:
        origin = _parse_origin(metadata)
        axes = {name: rows for name, rows in tensors.items() if not name.startswith(_VALUES)}
        values = {name: tensors[_VALUES + name] for name in axes}
        counts = parse(metadata["votes"])
        votes = {
            name: torch.tensor(counts[name], dtype=torch.int64).reshape(-1, 2) for name in axes
        }
        if not axes:
            raise ValueError("it has no axes of any module")
        if lost := counts.keys() - axes.keys():
            raise ValueError(f"it has no axes of {min(lost)}, but votes for them")
        for name, axes_KR in axes.items():
            _check_module(name, axes_KR, values[name], votes[name])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        # RecursionError is a RuntimeError.
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path} is not a basis: {why}", wanted=f"a file of schema {SCHEMA}", do=_REDO
        ) from error
    return axes, values, votes, origin


def _parse_origin(metadata: dict[str, str]) -> Origin:
    if metadata["schema"] != SCHEMA:
        raise ValueError(f"schema {metadata['schema']!r}")
    stated: dict[str, object] = {name: metadata[name] for name in ("model", "captured", *_SETTINGS)}
    stated |= {
        "weights": metadata["weights_sha256"],
        "rank": None if metadata["rank"] == "full" else metadata["rank"],
    }
    stated |= {name: parse(metadata[name]) for name in ("pairs", "groups", "skipped")}
    stated |= {name: parse(metadata[name]) for name in ("coverage", "tokens") if name in metadata}
    stated["chat_template"] = metadata.get("chat_template_sha256", "")
    origin = validated(Origin, stated)
    if (
        metadata["pairs_sha256"] != origin.pairs_digest
        or metadata["settings_sha256"] != origin.settings_digest
    ):
        raise ValueError("its hashes do not belong to its own pairs or settings")
    if len(origin.pairs) != len(origin.groups):
        raise ValueError(f"{len(origin.pairs)} pairs and {len(origin.groups)} groups")
    if not 0 <= origin.captured <= 1.000001:
        raise ValueError(f"captured {origin.captured}, which is not a share")
    return origin


def _check_module(name: str, axes_KR: Tensor, values_K: Tensor, votes_K2: Tensor) -> None:
    k = len(votes_K2)
    if (
        axes_KR.ndim != 2
        or len(axes_KR) != k
        or values_K.shape != (k,)
        or not 0 < k <= min(_MOST, axes_KR.shape[1])
    ):
        raise ValueError(
            f"{name} has axes {list(axes_KR.shape)}, singular values {list(values_K.shape)} and "
            f"{k} votes"
        )
    if axes_KR.dtype != torch.float32 or values_K.dtype != torch.float32:
        raise ValueError(
            f"{name} has axes in {axes_KR.dtype} and singular values in {values_K.dtype}, not "
            f"float32"
        )
    if not (torch.isfinite(axes_KR).all() and torch.isfinite(values_K).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    if (values_K < 0).any() or (votes_K2 < 0).any():
        raise ValueError(f"{name} has negative singular values or votes")
    wide_KR = axes_KR.double()
    used_K = wide_KR.any(dim=1)
    error = float((wide_KR @ wide_KR.T - torch.diag(used_K.double())).abs().max())
    if error > _SKEW:
        raise ValueError(
            f"the axes of {name} are off from orthonormal by {error:.2g}, more than {_SKEW:g}"
        )


def _stale(path: str | Path, what: str, seen: str, wanted: str) -> DataError:
    return DataError(f"{path} was made for other {what}: {seen}", wanted=wanted, do=_REDO)


# Singular values below this share of the first, times N, are rounding of float32 gradients, not
# axes.
_ROUNDING = torch.finfo(torch.float32).eps


def gram(rows_NR: Tensor) -> Tensor:
    """Return the Gram matrix of the rows, [N, N] in float64."""
    return rows_NR.double() @ rows_NR.double().T


def find_axes(
    difference_NR: Tensor,
    gram_NN: Tensor,
    *,
    top_k: int,
    method: str,
    clean: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the axes of one module by one of two methods, with their singular values and votes.

    - ``svd``: right singular vectors of the differences, not centred, strongest first.
    - ``lda``: the differences are whitened by the covariance of the clean gradients before the SVD,
      and the result is taken back: ``w = Σ^(−1/2) z``, made orthonormal in order. Σ is shrunk
      towards a multiple of the identity by :func:`shrinkage`. Values are those of the whitened
      differences: units of one clean standard deviation.

    Differences are hack minus clean, one row per pair; ``gram_NN`` is their Gram matrix. ``lda``
    needs clean gradients and theirs. No more than N axes come back, as a :class:`Basis` has them;
    one that the data cannot fill is zero.
    """
    rows_NR = difference_NR.double()
    if method == "lda":
        assert clean is not None
        axes_KR, values_K = _discriminants(rows_NR, clean[0].double(), clean[1], top_k)
    else:
        axes_KR, values_K = _singular_rows(rows_NR, gram_NN, top_k)
    turned_KR, votes_K2 = _oriented(rows_NR, axes_KR)
    return turned_KR.float(), values_K.float(), votes_K2


def _singular_rows(rows_NR: Tensor, gram_NN: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    k = min(top_k, *rows_NR.shape)
    values_K = values_N.flip(0)[:k].clamp_min(0).sqrt()
    kept = values_K > values_K[0] * len(rows_NR) * _ROUNDING
    leading_NK = vectors_NN.flip(1)[:, :k]
    raw_KR = (leading_NK.T @ rows_NR) / torch.where(kept, values_K, torch.inf)[:, None]
    return _orthonormal(raw_KR, kept), torch.where(kept, values_K, 0.0)


def _orthonormal(raw_KR: Tensor, kept_K: Tensor) -> Tensor:
    """Return the rows made exactly orthonormal in their order, without turning any; rows not kept
    become zero.
    """
    axes_KR = torch.zeros_like(raw_KR)
    if kept_K.any():
        basis_RJ, upper_JJ = torch.linalg.qr(raw_KR[kept_K].T)
        axes_KR[kept_K] = (basis_RJ * upper_JJ.diagonal().sign()).T
    return axes_KR


def _discriminants(
    rows_NR: Tensor, clean_NR: Tensor, clean_gram_NN: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    n, r = clean_NR.shape
    centred_NR = clean_NR - clean_NR.mean(dim=0)
    gram_NN = clean_gram_NN - clean_gram_NN.mean(dim=0) - clean_gram_NN.mean(dim=1, keepdim=True)
    gram_NN = gram_NN + clean_gram_NN.mean()
    mean_variance = float(gram_NN.trace()) / (n * r)
    if mean_variance <= 0:  # the clean gradients do not vary, so there is nothing to whiten with
        return _singular_rows(rows_NR, gram(rows_NR), top_k)
    # Σ = floor·I + Q diag(s²) Qᵀ is never formed: Σ^(−1/2) is one factor along the directions Q and
    # one elsewhere.
    share = shrinkage(gram_NN, r)
    floor = share * mean_variance
    directions_MR, values_M = _singular_rows(centred_NR, gram_NN, n)
    elsewhere = floor**-0.5
    along_M = (floor + (1 - share) * values_M**2 / n).rsqrt()

    def whiten(some_NR: Tensor) -> Tensor:
        inside_NM = some_NR @ directions_MR.T
        whitened_NR: Tensor = (
            elsewhere * some_NR + (inside_NM * (along_M - elsewhere)) @ directions_MR
        )
        return whitened_NR

    whitened_NR = whiten(rows_NR)
    axes_KR, values_K = _singular_rows(whitened_NR, gram(whitened_NR), top_k)
    return _orthonormal(whiten(axes_KR), values_K > 0), values_K


def shrinkage(gram_NN: Tensor, r: int) -> float:
    """Return how far to shrink a covariance towards a multiple of the identity (Ledoit and Wolf
    2004).

    With S = XᵀX/n for the centred rows X and μ = tr S/r it is ``min(1, b²/d²)``, where ``d² = ‖S −
    μI‖²`` and ``b² = Σ‖x xᵀ − S‖²/n²`` in Frobenius norms. Never below 0.001, so that the result is
    invertible when there are fewer rows than columns.
    """
    n = len(gram_NN)
    squared = float((gram_NN**2).sum()) / n**2
    distance = squared - float(gram_NN.trace() / n) ** 2 / r
    spread = (float((gram_NN.diagonal() ** 2).sum()) - n * squared) / n**2
    return min(1.0, max(1e-3, spread / distance)) if distance > 0 else 1.0


def _oriented(rows_NR: Tensor, axes_KR: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each axis so that most pairs have a positive component; the mean decides a tie, which
    its votes show.
    """
    along_NK = rows_NR @ axes_KR.T
    for_K = (along_NK > 0).sum(dim=0)
    against_K = (along_NK < 0).sum(dim=0)
    flip_K = (for_K < against_K) | ((for_K == against_K) & (along_NK.sum(dim=0) < 0))
    votes_K2 = torch.where(
        flip_K[:, None], torch.stack([against_K, for_K], 1), torch.stack([for_K, against_K], 1)
    )
    return torch.where(flip_K[:, None], -axes_KR, axes_KR), votes_K2


def cin(gradients_NR: Tensor, axes_KR: Tensor, two_sided: bool = False) -> Tensor:
    """Return the share of each gradient that lies along the axes of its module, [N], from 0 to 1.

    ``‖relu(V g)‖ / ‖g‖``: only what points hack-ward counts, which is what the one-sided gate
    removes. Two-sided it is ``‖V g‖ / ‖g‖``. A zero gradient has share 0.

    Args:
        gradients_NR: Gradients, one per row.
        axes_KR: Orthonormal rows; zero rows add nothing.
        two_sided: Whether both signs count.
    """
    along_NK: Tensor = gradients_NR @ axes_KR.to(gradients_NR).T
    along_N: Tensor = (along_NK if two_sided else along_NK.relu()).norm(dim=1)
    lengths_N = gradients_NR.norm(dim=1)
    return along_N / torch.where(lengths_N > 0, lengths_N, 1.0)


def cin_over_modules(
    gradients: Mapping[str, Tensor], basis: Basis, *, two_sided: bool = False
) -> Tensor:
    """Return the mean of :func:`cin` over all modules of the basis, one number per sample, [N].

    Args:
        gradients: Gradients, [N, R] per module name; modules that the basis does not have are left
            out.
        basis: Basis with the axes.
        two_sided: Whether both signs count.

    Raises:
        UsageError: A module of the basis has no gradients.
    """
    missing = [name for name in basis.axes if name not in gradients]
    if missing or not basis.axes:
        seen = f"no gradients of {missing[0]}" if missing else "a basis without modules"
        do = "compute the gradients and the basis with the same model"
        raise UsageError(seen, wanted="gradients of every module of the basis", do=do)
    each = [cin(gradients[name], axes_KR, two_sided) for name, axes_KR in basis.axes.items()]
    return torch.stack(each).mean(dim=0)
