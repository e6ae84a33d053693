"""A basis of hack directions: axes for each weight matrix of a model, their origin, and the file.

The file is safetensors, schema ``v2_with_sv``. Tensors, for every module name as in
``model.named_modules()``::

    {name}        [K, R]   float32   the axes, orthonormal rows that point hack-ward
    _sv/{name}    [K]      float32   their singular values

Metadata (all text): ``model``, ``dtype``, ``top_k``, ``tau_axis`` and ``schema``, and what makes a
stale file known: ``method``, ``rank`` (or ``full``), ``factors``, ``weights_sha256``,
``pairs_sha256``, ``settings_sha256``; further ``pairs``, ``groups`` and ``skipped`` (JSON lists),
``captured``, and ``votes`` (JSON: name to lists of [for, against]). Where the modules are only a
part of the model's weight matrices there is also ``coverage`` (JSON: ``share`` of the weights and
the names ``left_out``), where modules are experts ``tokens`` (JSON: name of the module that holds
them to the number of tokens that came to each), and where the pairs had messages
``chat_template_sha256``.

Shapes: N samples, K axes, R coordinates of δS in a module.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.files.jsonl import parse
from assay.files.storage import write_atomic
from assay.files.tensors import LONGEST_TENSORS, check_tensors
from assay.models.model import AnyModel
from assay.vhack.directions.basis.axes import MOST_AXES, check_axis_settings, zero_weak_axes
from assay.vhack.directions.gradients.targets import Coverage, target_modules, weights_digest
from assay.vhack.names import BASIS
from assay.vhack.pairs.pairs import validated

ORIGIN_SETTINGS = ("dtype", "rank", "factors", "top_k", "tau_axis", "method")
Tensors = dict[str, Tensor]
VALUES_PREFIX = "_sv/"
# Largest entry of V Vᵀ − 1; what extraction writes stays below 1e-6.
_SKEW = 1e-3
_REDO = (
    "extract it again (assay vhack extract), or give the model, pairs and settings it was made with"
)


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
        """Keys of all pairs that were given, used or skipped, sorted."""
        return tuple(sorted(self.pairs + self.skipped))

    @property
    def pairs_digest(self) -> str:
        """SHA-256 in hex of the pairs that were given, whatever their order."""
        return hashlib.sha256("\n".join(self.given).encode()).hexdigest()

    @property
    def settings_digest(self) -> str:
        """SHA-256 in hex of the settings: dtype, rank, factors, top_k, tau_axis and method."""
        return hashlib.sha256(
            json.dumps({name: getattr(self, name) for name in ORIGIN_SETTINGS}).encode()
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
        """Module and index of every axis whose vote is a tie, so that its sign is arbitrary."""
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
        check_axis_settings(min(k_use, MOST_AXES), tau_axis)
        axes = {
            name: zero_weak_axes(axes_KR, self.singular_values[name], tau_axis)[:k_use]
            for name, axes_KR in self.axes.items()
        }
        return replace(
            self,
            axes=axes,
            singular_values={name: row_K[:k_use] for name, row_K in self.singular_values.items()},
            votes={name: votes_K2[:k_use] for name, votes_K2 in self.votes.items()},
        )

    def save(self, path: str | Path) -> None:
        """Write the basis as one safetensors file, replacing an older one in one step.

        Raises:
            StorageError: The file cannot be written.
        """
        tensors = {name: axes_KR.contiguous() for name, axes_KR in self.axes.items()}
        tensors |= {
            VALUES_PREFIX + name: values_K.contiguous()
            for name, values_K in self.singular_values.items()
        }
        write_atomic(path, save(tensors, metadata=basis_metadata(self.votes, self.origin)))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: "AnyModel | None" = None,
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
        basis = cls(*read_basis(path))
        if model is not None:
            basis.check_model(model, name=str(path))
        for name, wanted in (expect or {}).items():
            seen = getattr(basis.origin, name)
            if seen != wanted and name == "given":
                raise stale_basis(path, "pairs", "another set of them", "the pairs it is asked for")
            if seen != wanted:
                raise stale_basis(path, name, repr(seen), repr(wanted))
        return basis

    def check_model(self, model: AnyModel, *, name: str = "the basis") -> None:
        """Refuse a model with other modules, or another digest of its weights.

        Args:
            model: Model to check.
            name: What the error calls the basis.

        Raises:
            DataError: The model has other modules or weights.
        """
        modules = target_modules(model)
        for module, axes_KR in self.axes.items():
            if module not in modules or axes_KR.shape[1] > min(modules[module].weight.shape):
                raise stale_basis(
                    name,
                    "model",
                    f"axes of {module} with {axes_KR.shape[1]} coordinates",
                    "the model's modules",
                )
        digest = weights_digest(model)
        if self.origin.weights != digest:
            raise stale_basis(
                name, "weights", self.origin.weights[:16] or "none", f"weights {digest[:16]}"
            )

    def check_template(self, digest: str, *, name: str = "the basis") -> None:
        """Raise a DataError if another chat template rendered the pairs.

        An empty digest stands for no template, and is never refused.
        """
        digest_of_pairs = self.origin.chat_template
        if digest_of_pairs and digest and digest_of_pairs != digest:
            raise stale_basis(
                name, "chat template", digest_of_pairs[:16], f"the chat template {digest[:16]}"
            )


def basis_metadata(votes: Tensors, origin: Origin) -> dict[str, str]:
    """Return the metadata of a file of this origin, all of it text."""
    metadata = {name: getattr(origin, name) for name in ("model", "dtype", "method", "factors")}
    metadata |= {name: json.dumps(getattr(origin, name)) for name in ("pairs", "groups", "skipped")}
    metadata |= {name: repr(getattr(origin, name)) for name in ("top_k", "tau_axis", "captured")}
    metadata |= {
        "schema": BASIS,
        "rank": "full" if origin.rank is None else str(origin.rank),
        "weights_sha256": origin.weights,
        "pairs_sha256": origin.pairs_digest,
        "settings_sha256": origin.settings_digest,
        "votes": json.dumps({name: votes_K2.tolist() for name, votes_K2 in votes.items()}),
    }
    optional = {
        "coverage": json.dumps(asdict(origin.coverage)) if origin.coverage.left_out else "",
        "tokens": json.dumps(origin.tokens) if origin.tokens else "",
        "chat_template_sha256": origin.chat_template,
    }
    return metadata | {name: text for name, text in optional.items() if text}


def read_tensors(path: str | Path, do: str) -> tuple[dict[str, str], Tensors]:
    """Return metadata and tensors of a safetensors file.

    An unreadable file is a DataError, whose advice is ``do``.
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


def read_basis(path: str | Path) -> tuple[Tensors, Tensors, Tensors, Origin]:
    """Return the axes, singular values, votes and origin in a file, after all checks."""
    metadata, tensors = read_tensors(path, _REDO)
    try:
        origin = _parse_origin(metadata)
        axes = {name: rows for name, rows in tensors.items() if not name.startswith(VALUES_PREFIX)}
        values = {name: tensors[VALUES_PREFIX + name] for name in axes}
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
            f"{path} is not a basis: {why}", wanted=f"a file of schema {BASIS}", do=_REDO
        ) from error
    return axes, values, votes, origin


def _parse_origin(metadata: dict[str, str]) -> Origin:
    if metadata["schema"] != BASIS:
        raise ValueError(f"schema {metadata['schema']!r}")
    stated: dict[str, object] = {
        name: metadata[name] for name in ("model", "captured", *ORIGIN_SETTINGS)
    }
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
        or not 0 < k <= min(MOST_AXES, axes_KR.shape[1])
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
    wanted_KK = torch.diag(wide_KR.any(dim=1).double())
    error = float((wide_KR @ wide_KR.T - wanted_KK).abs().max())
    if error > _SKEW:
        raise ValueError(
            f"the axes of {name} are off from orthonormal by {error:.2g}, more than {_SKEW:g}"
        )


def stale_basis(path: str | Path, what: str, seen: str, wanted: str) -> DataError:
    """Return the error of a basis that was made for something else."""
    return DataError(f"{path} was made for other {what}: {seen}", wanted=wanted, do=_REDO)


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


def check_covered(gradients: Mapping[str, Tensor], basis: Basis) -> None:
    """Raise UsageError unless gradients are of every module of a basis, in its coordinates."""
    missing = [
        f"no gradients of {name} with {axes_KR.shape[1]} coordinates"
        for name, axes_KR in basis.axes.items()
        if name not in gradients or gradients[name].shape[1] != axes_KR.shape[1]
    ]
    if missing or not basis.axes:
        raise UsageError(
            missing[0] if missing else "a basis without modules",
            wanted="gradients of every module of the basis",
            do="compute the gradients and the basis with the same model, and the same rank",
        )


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
        UsageError: A module of the basis has no gradients, or in other coordinates.
    """
    check_covered(gradients, basis)
    shares = [cin(gradients[name], axes_KR, two_sided) for name, axes_KR in basis.axes.items()]
    return torch.stack(shares).mean(dim=0)
