"""The files of an adapter: δS itself, and the forms that others read: plain weights, and LoRA.

δS is a safetensors file with the schema ``assay.delta_s/1``. Tensors, for every module name as in
``model.named_modules()``::

    {name}          [R]   float32   δS
    _probe/{name}   [2]   float32   ‖δW z‖ and s·δW z for fixed z and s: what δS does with the factors it was made with

Metadata (all text): ``schema``, ``weights_sha256`` of the adapted matrices as they were before, ``delta_sha256`` of all
δS. δS are coordinates, and where singular values are equal, or nearly so, another machine may give other singular
vectors. The probe shows it: it is the same only if δW is.

*Plain weights* are what an inference engine is given after a step. LoRA of PEFT beside δS is merged on the way, one
layer after the other, and taken out again by writing the old weights back, bit by bit.

*As LoRA*: ``U diag(δS) Vh`` has orthonormal U and Vh, so |δS| are its singular values, and its best approximation of
rank r keeps the r largest (Eckart and Young, 1936). The relative error in the Frobenius norm is exact:
``√(Σ dropped δS² / Σ δS²)``.

Shapes: M modules of a group, O outputs, I inputs, R coordinates, L rank of LoRA.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from assay.errors import DataError, ModelError, UsageError
from assay.files.storage import storage_error, write_atomic
from assay.models import checkpoint as adapters
from assay.streams.backends import as_tensor, get_backend
from assay.streams.definition import seed32
from assay.vhack.basis.basis import read_tensors
from assay.vhack.delta.division import gather_whole
from assay.vhack.delta.groups import Group
from assay.vhack.gradients.svd import Factors
from assay.vhack.gradients.targets import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SCHEMA = "assay.delta_s/1"
_PROBE = "_probe/"
_TOLERANCE = 1e-2
_REDO = "attach the adapter to the model that the file was made with, with the same factors, or train again"


def save_delta(path: Path, groups: Sequence[Group], delta: Mapping[str, Tensor]) -> None:
    """Write δS by module name; :meth:`DeltaS.save` calls it."""
    values = {name: delta_R.cpu().contiguous() for name, delta_R in delta.items()}
    probes = {_PROBE + name: rows for name, rows in _probes(groups, values).items()}
    metadata = {"schema": _SCHEMA, "weights_sha256": _weights(groups), "delta_sha256": _digest(values)}
    write_atomic(path, save({**values, **probes}, metadata=metadata))


def read_delta_lengths(path: str | Path) -> dict[str, int]:
    """Return the number of coordinates of each module in a file of :meth:`DeltaS.save`.

    Raises:
        DataError: The file cannot be read, or is none of these.
    """
    _, values, _ = _read(Path(path))
    if odd := next((name for name, tensor in values.items() if tensor.ndim != 1), None):
        seen = f"{path}: δS of {odd} of shape {list(values[odd].shape)}"
        raise DataError(seen, wanted="one number for each coordinate", do=_REDO)
    return {name: len(tensor) for name, tensor in values.items()}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Return metadata, δS and probes of a file with this schema."""
    metadata, tensors = read_tensors(path, _REDO)
    if metadata.get("schema") != _SCHEMA:
        raise DataError(f"{path} has schema {metadata.get('schema')!r}", wanted=_SCHEMA, do="give one of DeltaS.save")
    probes = {name.removeprefix(_PROBE): tensors.pop(name) for name in list(tensors) if name.startswith(_PROBE)}
    return metadata, tensors, probes


def load_delta(path: Path, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the δS in a file by module name, after all checks; :meth:`DeltaS.load` calls it."""
    metadata, values, theirs = _read(path)
    shapes = {name: (group.rank,) for group in groups for name in group.names}
    others = {name: tuple(tensor.shape) for name, tensor in values.items()} != shapes
    odd = [n for n, delta_R in values.items() if delta_R.dtype != torch.float32 or not bool(delta_R.isfinite().all())]
    digest, weights = metadata.get("delta_sha256"), metadata.get("weights_sha256")
    for is_wrong, seen, wanted in (
        (others, "has δS of other modules or ranks", "those of this adapter"),
        (odd, f"has δS of {next(iter(odd), '')} that are not finite or not float32", "finite float32 numbers"),
        (not odd and digest != _digest(values), "is damaged: its δS do not have its hash", "a whole file"),
        (weights != _weights(groups), "was made for other weights", "those of this model"),
    ):
        if is_wrong:
            raise DataError(f"{path} {seen}", wanted=wanted, do=_REDO)
    for name, probe in _probes(groups, values).items():
        other = theirs.get(name, torch.full_like(probe, torch.nan))
        # A δS that is far too large has an infinite probe.
        known = (other.dtype, other.shape) == (probe.dtype, probe.shape) and bool(probe.isfinite().all())
        if not (known and (other - probe).norm() <= _TOLERANCE * probe[0]):
            raise DataError(f"{path}: δS of {name} means something else here", wanted="the same factors", do=_REDO)
    return values


def _digest(values: dict[str, Tensor]) -> str:
    lines = "".join(f"{name}\n{tensor_digest(values[name])}\n" for name in sorted(values))
    return hashlib.sha256(lines.encode()).hexdigest()


def _weights(groups: Sequence[Group]) -> str:
    lines = sorted(f"{name}\n{digest}\n" for group in groups for name, digest in group.digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _probes(groups: Sequence[Group], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``(‖δW z‖, s·δW z)`` of every module; z and s are portable signs."""
    found: dict[str, Tensor] = {}
    for group in groups:
        z_I, s_O = _signs("z", group.right.shape[2], group.left), _signs("s", group.left.shape[1], group.left)
        delta_MR = torch.stack([values[name] for name in group.names]).to(group.left.device)
        along_MR = (group.right.float() @ z_I) * delta_MR
        change_MO = (group.left.float() @ along_MR.unsqueeze(2)).squeeze(2)
        probe_M2 = torch.stack([change_MO.norm(dim=1), change_MO @ s_O / len(s_O) ** 0.5], dim=1).cpu()
        found |= {name: probe_M2[index].clone() for index, name in enumerate(group.names)}
    return found


def _signs(text: str, size: int, like: Tensor) -> Tensor:
    return as_tensor(get_backend("numpy").signs([seed32(f"assay.delta_s {text}")], size))[0].float().to(like.device)


_OWN = "delta_s."
_LORA = "lora_"
_BASE = ".base_layer"
# What PEFT puts around the names of a model, and of modules that it trains whole.
_PREFIXES = (adapters.PREFIX, "modules_to_save.default.")


def plain_name(name: str) -> str:
    """Return the name that a parameter or module has in the model without PEFT."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name.replace(f"{_BASE}.", ".").removesuffix(_BASE)


def plain_weights(model: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model without δS and LoRA in them as parameters; :meth:`DeltaS.weights` describes it."""
    for name, parameter in model.named_parameters():
        if name.startswith(_OWN) or f".{_OWN}" in name or _LORA in name or "original_module" in name:
            continue
        if name.endswith(f"{_BASE}.weight"):
            layer = model.get_submodule(name.removesuffix(f"{_BASE}.weight"))
            yield plain_name(name), _with_lora(name, layer, parameter)
        else:
            yield plain_name(name), gather_whole(parameter).detach()


@torch.no_grad()
def _with_lora(name: str, layer: Any, weight: nn.Parameter) -> Tensor:
    """Return the weight of a layer of PEFT with LoRA merged as PEFT merges it; the layer stays as it is."""
    if (sharded := isinstance(weight, DTensor)) or layer.merged:
        raise ModelError(
            f"{name} is {'sharded, with LoRA beside it' if sharded else 'merged with its LoRA already'}",
            wanted="whole weights without LoRA in them",
            do="train LoRA and δS without FSDP2" if sharded else "call unmerge_adapter of the model of PEFT",
        )
    before = weight.detach().clone()
    layer.merge()
    merged = weight.detach().clone()
    layer.unmerge()
    weight.copy_(before)  # subtracting has left the error of rounding
    return merged


@dataclass(frozen=True)
class LoRA:
    """δS as LoRA.

    Attributes:
        rank: Rank of every matrix.
        error: Error ‖δW − B A‖ / ‖δW‖ in the Frobenius norm, over all matrices together.
        errors: Error of each matrix, by module name; 0 where δS is.
    """

    rank: int
    error: float
    errors: dict[str, float]

    @property
    def worst(self) -> str:
        """Name of the matrix with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])


def save_lora(folder: Path, delta: dict[str, Tensor], factors: dict[str, Factors], rank: int, base: str) -> LoRA:
    """Write δS as a directory of PEFT; :meth:`DeltaS.save_lora` describes it."""
    if rank < 1:
        raise UsageError(f"LoRA of rank {rank}", wanted="at least 1", do="choose a larger one")
    tensors: dict[str, Tensor] = {}
    errors, dropped, total = {}, 0.0, 0.0
    for name, delta_R in delta.items():
        squares_R, order_R = delta_R.double().square().cpu().sort(descending=True)
        lost, all_of_it = float(squares_R[rank:].sum()), float(squares_R.sum())
        errors[plain_name(name)] = (lost / all_of_it) ** 0.5 if all_of_it else 0.0
        dropped, total = dropped + lost, total + all_of_it
        kept = order_R[:rank].to(delta_R.device)
        left_OR, right_RI = factors[name].left, factors[name].right
        # A and B on the CPU; what the rank is too large for is zero.
        a_LI, b_OL = torch.zeros(rank, right_RI.shape[1]), torch.zeros(len(left_OR), rank)
        a_LI[: len(kept)] = right_RI[kept].float().cpu()
        b_OL[:, : len(kept)] = (left_OR[:, kept].float() * delta_R[kept]).cpu()
        for end, factor in zip(adapters.FACTORS, (a_LI, b_OL), strict=True):
            tensors[f"{adapters.PREFIX}{plain_name(name)}{end}"] = factor
    made = LoRA(rank, (dropped / total) ** 0.5 if total else 0.0, errors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the product is not scaled
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({plain_name(name).rpartition(".")[2] for name in delta}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    metadata = {"format": "pt", "relative_error": repr(made.error)}
    write_atomic(folder / adapters.WEIGHTS, save(tensors, metadata=metadata))
    write_atomic(folder / adapters.CONFIG, json.dumps(config, indent=2) + "\n")
    return made
