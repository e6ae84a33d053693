"""The file of a basis: safetensors, schema ``v2_with_sv``.

Tensors, for every module name as in ``model.named_modules()``::

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

Shapes: K axes, R coordinates of δS in a module.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assay.errors import DataError
from assay.files.jsonl import parse
from assay.files.tensors import LONGEST_TENSORS, check_tensors
from assay.vhack.names import BASIS
from assay.vhack.pairs.pairs import validated

if TYPE_CHECKING:
    pass
from assay.vhack.directions.basis.origin import ORIGIN_SETTINGS, Origin

Tensors = dict[str, Tensor]

SCHEMA = BASIS

VALUES_PREFIX = "_sv/"

# Axes of a module in a file: to check them takes time that grows with their cube.
_MOST_AXES = 1024

# Largest entry of V Vᵀ − 1; what extraction writes stays below 1e-6.
_SKEW = 1e-3

_REDO = (
    "extract it again (assay vhack extract), or give the model, pairs and settings it was made with"
)


def basis_metadata(votes: Tensors, origin: Origin) -> dict[str, str]:
    """Return the metadata of a file of this origin, all of it text."""
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
            f"{path} is not a basis: {why}", wanted=f"a file of schema {SCHEMA}", do=_REDO
        ) from error
    return axes, values, votes, origin


def _parse_origin(metadata: dict[str, str]) -> Origin:
    if metadata["schema"] != SCHEMA:
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
        or not 0 < k <= min(_MOST_AXES, axes_KR.shape[1])
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


def stale_basis(path: str | Path, what: str, seen: str, wanted: str) -> DataError:
    """Return the error of a basis that was made for something else."""
    return DataError(f"{path} was made for other {what}: {seen}", wanted=wanted, do=_REDO)
