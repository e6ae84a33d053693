"""LoRA adapters: how a receipt names one, and how a verifier applies it.

An adapter adds (α / r) · B (A x) to the products of some linear layers. It is computed beside them,
as servers do it, and never merged: merged weights are rounded once more, which is more than the
noise of honest engines.

Legend of shapes: R rank, I inputs and O outputs of a linear layer.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from assay.errors import ModelError, UsageError
from assay.files.jsonl import read_json
from assay.files.references import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from assay.models.model import Model
from assay.poc.responses.receipts import digest_adapter

_PREFIX = "base_model.model."
"""What stands before the name that a module has in the model."""

_FACTORS = (".lora_A.weight", ".lora_B.weight")
"""What follows that name for A [R, I] and B [O, R] of the product B A."""

_READ: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (
        True,
        False,
        None,
        "gaussian",
        "eva",
        "orthogonal",
    ),  # others subtract from the model first
}
"""Settings that must have one of these values; the last one where the configuration has none."""

_FREE = {
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "task_type",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
    "eva_config",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
}
"""Settings that are read above, or that change nothing of what is computed. Every other one must be
empty or off.
"""


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter that can be run."""

    digest: str  # digest of its files
    path: Path  # directory of its files
    scale: float  # factor α / r of its products; α / √r where the configuration says so
    # the factors A [R, I] and B [O, R] of every linear layer that it changes, by its name
    products: dict[str, tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]] = field(repr=False)

    @contextmanager
    def on(self, model: Model) -> Iterator[None]:
        """Compute with the adapter inside the block; a ModelError for a missing layer."""
        layers = {name: _layer(model, name, *factors) for name, factors in self.products.items()}
        # The hooks are removed too if the device has no room for a later factor.
        with ExitStack() as hooks:
            for name, layer in layers.items():
                a_RI, b_OR = (factor.to(layer.weight) for factor in self.products[name])
                hooks.enter_context(
                    layer.register_forward_hook(addition_hook(a_RI, b_OR, self.scale))
                )
            yield


def load_adapter(path: str | Path) -> Lora:
    """Read a LoRA adapter directory as peft writes it.

    Raises:
        ModelError: A file is missing, or is not what it should be.
        UsageError: The adapter changes more than products of linear layers.
    """
    digest = digest_adapter(path)
    try:
        config = read_json(Path(path) / ADAPTER_CONFIG)
        tensors = load_file(Path(path) / ADAPTER_WEIGHTS)
        rank = config["r"]
        alpha = config["lora_alpha"]
        if type(rank) is not int or type(alpha) not in (int, float):  # "nan" would be a number
            raise TypeError(f"r {rank!r:.20} and lora_alpha {alpha!r:.20}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except Exception as error:
        raise ModelError(
            f"the adapter in {path}: {type(error).__name__}: {error}"[:300],
            wanted="an adapter as peft writes it",
            do="write it again",
        ) from None
    # Only settings that are known to leave the products as they are pass, so a new one of peft
    # is refused until it was looked at.
    for name, value in ({name: values[-1] for name, values in _READ.items()} | config).items():
        if name not in _FREE and (
            value not in _READ[name] if name in _READ else value not in (None, False, {}, [])
        ):
            raise UsageError(
                f"an adapter with {name} {value!r:.60}",
                wanted="a LoRA adapter that adds only products B A x",
                do="replay the responses of another adapter",
            )
    return Lora(digest, Path(path), scale, _products(tensors))


def _products(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of factors by the name of their layer; a UsageError where a tensor has no
    pair.
    """
    names = {
        name.removeprefix(_PREFIX).removesuffix(end)
        for name in tensors
        for end in _FACTORS
        if name.endswith(end)
    }
    expected = {f"{_PREFIX}{name}{end}" for name in names for end in _FACTORS}
    odd = sorted(expected ^ tensors.keys()) or [
        name for name, tensor in tensors.items() if tensor.ndim != 2
    ]
    if not names or odd:
        seen = f"an adapter with {odd[0]}" if odd else "an adapter without weights"
        raise UsageError(
            seen,
            wanted="two matrices for each linear layer that it changes, and nothing else",
            do="replay the responses of another adapter",
        )
    return {
        name: (tensors[f"{_PREFIX}{name}{_FACTORS[0]}"], tensors[f"{_PREFIX}{name}{_FACTORS[1]}"])
        for name in names
    }


def _layer(model: Model, name: str, a_RI: Tensor, b_OR: Tensor) -> nn.Linear:
    try:
        layer = model.module.get_submodule(name)
    except AttributeError:
        layer = None
    shape = (len(b_OR), a_RI.shape[1])
    if (
        not isinstance(layer, nn.Linear)
        or tuple(layer.weight.shape) != shape
        or len(a_RI) != b_OR.shape[1]
    ):
        raise ModelError(
            f"an adapter of {name} with {shape[1]} inputs and {shape[0]} outputs",
            wanted=f"linear layers of {model.reference}",
            do="pass an adapter that was made for this model",
        )
    return layer


def addition_hook(
    a_RI: Tensor, b_OR: Tensor, scale: float
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return the forward hook that adds the product of a layer's two factors to its output."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + scale * (inputs[0] @ a_RI.T @ b_OR.T)

    return add
