"""The pass through fused experts that leaves the δS gradient of every sample behind."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay.errors import ModelError
from assay.vhack.directions.gradients.batches import SampleBatch, Segments
from assay.vhack.directions.gradients.targets import expert_matrices, fused_names


class ExpertsPass:
    """What replaces the forward function of fused experts, the module of that name.

    Tokens are sorted by expert. The sort is stable, and the samples stand one after the other among
    the rows before it, so the rows of one expert are again those of the first sample, then those of
    the second, and so on: they are samples of fewer rows each, some of none, and the taps of any
    other Linear sum over them exactly. Shapes: K experts per token, E experts, H hidden size.

    Functions in ``apply`` take the rows of a matrix and their segments; matrices that have none are
    only multiplied with. In ``tokens``, which is empty before a pass, it leaves how many tokens of
    each sample came to each expert, [B, E] on the CPU, under the name of the module.
    """

    def __init__(
        self,
        name: str,
        experts: nn.Module,
        apply: Mapping[str, Callable[[Tensor, Segments], Tensor]],
        batch: Callable[[], SampleBatch],
        tokens: dict[str, Tensor],
    ) -> None:
        self.name = name
        self.apply = apply
        self.batch = batch
        self.tokens = tokens
        self.experts: Any = experts
        self.matrices = expert_matrices(name, experts)

    def __call__(self, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs for each row, [N, H].

        The rows must be all tokens in their order.
        """
        batch = self.batch()
        if hidden_NH.ndim != 2 or len(hidden_NH) != batch.ids.numel():
            raise ModelError(
                f"{self.name} is given inputs of shape {list(hidden_NH.shape)}",
                wanted="[tokens, width], all tokens in their order, before they are sorted by "
                "expert",
                do="use another model",
            )
        order, sizes = self._sorted(index_NK, batch)
        rows = order // index_NK.shape[1]
        weight_X1 = weights_NK.flatten()[order, None]
        outputs = []
        start = 0
        for expert, counts in enumerate(sizes):
            end = start + sum(counts)
            if end > start:
                outputs.append(
                    self._say(expert, hidden_NH[rows[start:end]], counts) * weight_X1[start:end]
                )
            start = end
        if not outputs:
            return torch.zeros_like(hidden_NH)
        outputs_XH = torch.cat(outputs)
        total_NH = torch.zeros(hidden_NH.shape, dtype=outputs_XH.dtype, device=outputs_XH.device)
        return total_NH.index_add(0, rows[:start], outputs_XH).to(hidden_NH.dtype)

    def _sorted(self, index_NK: Tensor, batch: SampleBatch) -> tuple[Tensor, list[list[int]]]:
        """Return the order of places by expert, and the rows per expert and sample.

        An index beyond the last expert stands for none: its places are last, and are counted
        nowhere.
        """
        experts = int(self.experts.num_experts)
        samples = len(batch.encoded)
        chosen = index_NK.shape[1]
        expert_X = index_NK.flatten()
        cell_X = expert_X * samples + batch.sample.repeat_interleave(chosen)
        is_one_X = expert_X < experts
        is_counted_X = is_one_X & batch.is_token.repeat_interleave(chosen)
        rows_EB, tokens_EB = (
            torch.bincount(cell_X[which_X], minlength=experts * samples)
            .view(experts, samples)
            .cpu()
            for which_X in (is_one_X, is_counted_X)
        )
        self.tokens[self.name] = self.tokens.get(self.name, 0) + tokens_EB.T
        return torch.sort(expert_X, stable=True).indices, rows_EB.tolist()

    def _say(self, expert: int, inputs: Tensor, counts: list[int]) -> Tensor:
        segments, (up, down) = Segments.of(counts, inputs.device), fused_names(self.experts)
        inner = self._project(f"{self.name}.{up}.{expert}", inputs, segments)
        inner = (
            self.experts._apply_gate(inner) if self.experts.has_gate else self.experts.act_fn(inner)
        )
        return self._project(f"{self.name}.{down}.{expert}", inner, segments)

    def _project(self, name: str, inputs: Tensor, segments: Segments) -> Tensor:
        return cast(
            "Tensor",
            self.apply[name](inputs, segments)
            if name in self.apply
            else self.matrices[name](inputs),
        )
