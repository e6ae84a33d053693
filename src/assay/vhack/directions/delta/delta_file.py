"""The file of δS: safetensors with the schema ``assay.delta_s/1``.

Tensors, for every module name as in ``model.named_modules()``::

    {name}          [R]   float32   δS
    _probe/{name}   [2]   float32   ‖δW z‖ and s·δW z for fixed z and s: what δS does with
                                    the factors it was made with

Metadata (all text): ``schema``, ``weights_sha256`` of the adapted matrices as they were before, and
``delta_sha256`` of all δS. δS are coordinates, and where singular values are equal, or nearly so,
another machine may give other singular vectors. The probe shows it: it is the same only if δW is.

Shapes: M modules of a group, O outputs, I inputs, R coordinates.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from assay.errors import DataError
from assay.files.storage import write_atomic
from assay.streams.arrays import as_tensor
from assay.streams.backends import get_backend
from assay.streams.definition import seed32
from assay.vhack.directions.basis.basis import read_tensors
from assay.vhack.directions.delta.groups import ModuleGroup
from assay.vhack.directions.gradients.targets import tensor_digest
from assay.vhack.names import DELTA, check_delta

_PROBE = "_probe/"
_TOLERANCE = 1e-2
_REDO = (
    "attach the adapter to the model that the file was made with, with the same factors, or train "
    "again"
)


def save_delta(path: Path, groups: Sequence[ModuleGroup], delta: Mapping[str, Tensor]) -> None:
    """Write δS by module name; :meth:`DeltaS.save` calls it."""
    values = {name: delta_R.cpu().contiguous() for name, delta_R in delta.items()}
    probes = {_PROBE + name: rows for name, rows in _probes(groups, values).items()}
    metadata = {
        "schema": DELTA,
        "weights_sha256": _weights(groups),
        "delta_sha256": _digest(values),
    }
    write_atomic(path, save({**values, **probes}, metadata=metadata))


def read_delta_lengths(path: str | Path) -> dict[str, int]:
    """Return the number of coordinates of each module in a file of :meth:`DeltaS.save`.

    Raises:
        DataError: The file cannot be read, or is none of these.
    """
    _, values, _ = _read(Path(path))
    if odd := next((name for name, tensor in values.items() if tensor.ndim != 1), None):
        raise DataError(
            f"{path}: δS of {odd} of shape {list(values[odd].shape)}",
            wanted="one number for each coordinate",
            do=_REDO,
        )
    return {name: len(tensor) for name, tensor in values.items()}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Return metadata, δS and probes of a file with this schema."""
    metadata, tensors = read_tensors(path, _REDO)
    check_delta(path)
    probes = {
        name.removeprefix(_PROBE): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(_PROBE)
    }
    return metadata, tensors, probes


def load_delta(path: Path, groups: Sequence[ModuleGroup]) -> dict[str, Tensor]:
    """Return the δS in a file by module name, after all checks; :meth:`DeltaS.load` calls it."""
    metadata, values, stored_probes = _read(path)
    shapes = {name: (group.rank,) for group in groups for name in group.names}
    is_of_other_modules = {name: tuple(tensor.shape) for name, tensor in values.items()} != shapes
    odd = [
        n
        for n, delta_R in values.items()
        if delta_R.dtype != torch.float32 or not bool(delta_R.isfinite().all())
    ]
    for is_wrong, seen, wanted in (
        (is_of_other_modules, "has δS of other modules or ranks", "those of this adapter"),
        (
            odd,
            f"has δS of {next(iter(odd), '')} that are not finite or not float32",
            "finite float32 numbers",
        ),
        (
            not odd and metadata.get("delta_sha256") != _digest(values),
            "is damaged: its δS do not have its hash",
            "a whole file",
        ),
        (
            metadata.get("weights_sha256") != _weights(groups),
            "was made for other weights",
            "those of this model",
        ),
    ):
        if is_wrong:
            raise DataError(f"{path} {seen}", wanted=wanted, do=_REDO)
    for name, probe in _probes(groups, values).items():
        stored_probe = stored_probes.get(name, torch.full_like(probe, torch.nan))
        # A δS that is far too large has an infinite probe.
        is_comparable = (stored_probe.dtype, stored_probe.shape) == (
            probe.dtype,
            probe.shape,
        ) and bool(probe.isfinite().all())
        if not (is_comparable and (stored_probe - probe).norm() <= _TOLERANCE * probe[0]):
            raise DataError(
                f"{path}: δS of {name} means something else here",
                wanted="the same factors",
                do=_REDO,
            )
    return values


def _digest(values: dict[str, Tensor]) -> str:
    lines = "".join(f"{name}\n{tensor_digest(values[name])}\n" for name in sorted(values))
    return hashlib.sha256(lines.encode()).hexdigest()


def _weights(groups: Sequence[ModuleGroup]) -> str:
    lines = sorted(
        f"{name}\n{digest}\n" for group in groups for name, digest in group.digests.items()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _probes(groups: Sequence[ModuleGroup], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``(‖δW z‖, s·δW z)`` of every module; z and s are portable signs."""
    probes: dict[str, Tensor] = {}
    for group in groups:
        z_I = _signs("z", group.right.shape[2], group.left)
        s_O = _signs("s", group.left.shape[1], group.left)
        delta_MR = torch.stack([values[name] for name in group.names]).to(group.left.device)
        along_MR = (group.right.float() @ z_I) * delta_MR
        change_MO = (group.left.float() @ along_MR.unsqueeze(2)).squeeze(2)
        probe_M2 = torch.stack(
            [change_MO.norm(dim=1), change_MO @ s_O / len(s_O) ** 0.5], dim=1
        ).cpu()
        probes |= {name: probe_M2[index].clone() for index, name in enumerate(group.names)}
    return probes


def _signs(text: str, size: int, device_of: Tensor) -> Tensor:
    return (
        as_tensor(get_backend("numpy").signs([seed32(f"assay.delta_s {text}")], size))[0]
        .float()
        .to(device_of.device)
    )
