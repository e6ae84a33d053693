"""Experts whose weights stand in one three-dimensional tensor: a matrix each, and a pass whose rows know their sample.

transformers keeps the experts of a layer in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, [E, …, …]. Here each
is a target of its own, ``model.layers.0.mlp.experts.gate_up_proj.7``, as a Linear that shares the tensor's memory.

In their forward pass tokens are sorted by expert. The sort is stable, and the samples stand one after the other among
the rows before it, so the rows of one expert are again those of the first sample, then those of the second, and so on:
they are samples of fewer rows each, some of none, and the taps of any other Linear sum over them exactly.

Shapes: N rows (tokens of all samples), B samples, K experts per token, E experts, H hidden size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import ModelError
from assay.vhack.gradients.batches import Batch, Segments

_UP, _GATE_UP, _DOWN = "up_proj", "gate_up_proj", "down_proj"


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds experts in the form that transformers' own functions for experts take."""
    stated = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    return all(hasattr(module, name) for name in stated) and all(
        isinstance(tensor := getattr(module, own, None), nn.Parameter) and tensor.ndim == 3 for own in _names(module)
    )


def expert_matrices(name: str, experts: nn.Module) -> dict[str, nn.Linear]:
    """Return a Linear over the same memory for each matrix of each expert of a module that is fused."""
    found = {}
    for own in _names(experts):
        weights, biases = getattr(experts, own), getattr(experts, f"{own}_bias", None)
        for expert, weight in enumerate(weights.detach()):
            weight_OI = weight.T if experts.is_transposed else weight
            found[f"{name}.{own}.{expert}"] = _linear(weight_OI, None if biases is None else biases.detach()[expert])
    return found


def _names(experts: nn.Module) -> tuple[str, str]:
    return (_GATE_UP if getattr(experts, "has_gate", True) else _UP), _DOWN


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    # Not by its own constructor, which fills weights with random numbers first; there may be ten thousand of these.
    made = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = weight_OI.shape
    made.weight = nn.Parameter(weight_OI, requires_grad=False)
    made.register_parameter("bias", None if bias_O is None else nn.Parameter(bias_O, requires_grad=False))
    return made


class ExpertsPass:
    """What replaces the forward function of fused experts, the module of that name.

    Functions in ``apply`` take the rows of a matrix and their segments; matrices that have none are only multiplied
    with. In ``tokens``, which is empty before a pass, it leaves how many tokens of each sample came to each expert,
    [B, E] on the CPU, under the name of the module.
    """

    def __init__(
        self,
        name: str,
        experts: nn.Module,
        apply: Mapping[str, Callable[[Tensor, Segments], Tensor]],
        batch: Callable[[], Batch],
        tokens: dict[str, Tensor],
    ) -> None:
        self.name, self.apply, self.batch, self.tokens = name, apply, batch, tokens
        self.experts: Any = experts
        self.matrices = expert_matrices(name, experts)

    def __call__(self, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of what the experts of each row say, [N, H]; the rows must be all tokens in order."""
        batch = self.batch()
        if hidden_NH.ndim != 2 or len(hidden_NH) != batch.ids.numel():
            raise ModelError(
                f"{self.name} is given inputs of shape {list(hidden_NH.shape)}",
                wanted="[tokens, width], all tokens in their order, before they are sorted by expert",
                do="use another model",
            )
        order, sizes = self._sorted(index_NK, batch)
        rows = order // index_NK.shape[1]
        weight_X1 = weights_NK.flatten()[order, None]
        said, start = [], 0
        for expert, counts in enumerate(sizes):
            end = start + sum(counts)
            if end > start:
                said.append(self._say(expert, hidden_NH[rows[start:end]], counts) * weight_X1[start:end])
            start = end
        if not said:
            return torch.zeros_like(hidden_NH)
        said_XH = torch.cat(said)
        total_NH = torch.zeros(hidden_NH.shape, dtype=said_XH.dtype, device=said_XH.device)
        return total_NH.index_add(0, rows[:start], said_XH).to(hidden_NH.dtype)

    def _sorted(self, index_NK: Tensor, batch: Batch) -> tuple[Tensor, list[list[int]]]:
        """Return the places in ``index_NK`` in the order of their experts, and how many each has of each sample.

        An index beyond the last expert stands for none: its places are last, and are counted nowhere.
        """
        experts, samples, chosen = int(self.experts.num_experts), len(batch.encoded), index_NK.shape[1]
        expert_X = index_NK.flatten()
        cell_X = expert_X * samples + batch.sample.repeat_interleave(chosen)
        is_one_X = expert_X < experts
        is_counted_X = is_one_X & batch.is_token.repeat_interleave(chosen)
        rows_EB, tokens_EB = (
            torch.bincount(cell_X[which_X], minlength=experts * samples).view(experts, samples).cpu()
            for which_X in (is_one_X, is_counted_X)
        )
        self.tokens[self.name] = self.tokens.get(self.name, 0) + tokens_EB.T
        return torch.sort(expert_X, stable=True).indices, rows_EB.tolist()

    def _say(self, expert: int, inputs: Tensor, counts: list[int]) -> Tensor:
        segments, (up, down) = Segments.of(counts, inputs.device), _names(self.experts)
        inner = self._project(f"{self.name}.{up}.{expert}", inputs, segments)
        inner = self.experts._apply_gate(inner) if self.experts.has_gate else self.experts.act_fn(inner)
        return self._project(f"{self.name}.{down}.{expert}", inner, segments)

    def _project(self, name: str, inputs: Tensor, segments: Segments) -> Tensor:
        found: Tensor = self.apply[name](inputs, segments) if name in self.apply else self.matrices[name](inputs)
        return found
