"""Sampling completions for all runs at once; on a GPU one decoding step is a captured graph.

Tokens are drawn by inverting the distribution function at uniform numbers that the caller gives. Runs that are given
the same numbers and have the same weights therefore write the same, and differ only where their policies do: common
random numbers, which make a comparison between arms sharper.

Shapes as in :mod:`assay_research.study.forward`; V tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from assay_research.study.forward import Keys, StackedModel

_LOOK_EVERY = 8  # steps between looks at whether all rollouts have ended


class Generator:
    """Samples [R, P, G] completions of at most T tokens.

    Args:
        model: Model whose weights are read as they are at the time.
        shape: Sizes: P prompts, G rollouts, L prompt tokens without the last, T completion tokens.
        end: Token that ends a completion and fills the rest.
    """

    def __init__(self, model: StackedModel, shape: tuple[int, int, int, int], end: int) -> None:
        self.model, self.shape, self.end = model, shape, end
        prompts, rollouts, length, steps = shape
        rows, each = model.runs * prompts, (model.runs, prompts, rollouts)

        def empty(*sizes: int) -> Keys:
            whole = (rows, model.key_heads, *sizes, model.head_dim)
            kept: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
            return [(torch.zeros(whole, **kept), torch.zeros(whole, **kept)) for _ in range(model.n_layers)]

        self._keys, self._own = empty(length), empty(rollouts, steps)
        with model.device:
            self._lengths_RP = torch.ones(each[:2], dtype=torch.int64)
            self._token_RPG = torch.zeros(each, dtype=torch.int64)
            self._uniform_TRPG = torch.zeros(steps, *each)
            self._found_TRPG = torch.zeros(steps, *each, dtype=torch.int64)
            self._ended_RPG = torch.zeros(each, dtype=torch.bool)
            self._step = torch.zeros(1, dtype=torch.int64)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def sample(self, ids_RPL: Tensor, lengths_RP: Tensor, last: int, uniform_TRPG: Tensor) -> Tensor:
        """Return completions, [R, P, G, T] int64, filled with the end token.

        Args:
            ids_RPL: Prompts without their last token, padded on the right.
            lengths_RP: Lengths of the prompts.
            last: Last prompt token, the same for all.
            uniform_TRPG: Uniform numbers in [0, 1), one per token to draw.
        """
        for (k, v), (new_k, new_v) in zip(self._keys, self.model.read(ids_RPL), strict=True):
            k.copy_(new_k)
            v.copy_(new_v)
        self._lengths_RP.copy_(lengths_RP)
        self._uniform_TRPG.copy_(uniform_TRPG)
        if self._graph is None and self.model.device.type == "cuda":
            self._capture()
        self._begin(last)
        steps = self.shape[3]
        for done in range(1, steps + 1):
            if self._graph is None:
                self._advance()
            else:
                self._graph.replay()
            if done % _LOOK_EVERY == 0 and bool(self._ended_RPG.all()):
                break
        return self._found_TRPG.permute(1, 2, 3, 0).contiguous()

    def _begin(self, last: int) -> None:
        self._token_RPG.fill_(last)
        self._found_TRPG.fill_(self.end)
        self._ended_RPG.zero_()
        self._step.zero_()

    def _advance(self) -> None:
        hidden = self.model.next_hidden(self._token_RPG, self._keys, self._own, self._lengths_RP, self._step)
        logits_RPGV = (hidden @ self.model.head.T).float()
        below_RPGV = logits_RPGV.softmax(dim=-1).cumsum(dim=-1)
        uniform_RPG = self._uniform_TRPG.index_select(0, self._step)[0] * below_RPGV[..., -1]
        drawn_RPG = torch.searchsorted(below_RPGV, uniform_RPG[..., None], right=True)[..., 0]
        drawn_RPG = drawn_RPG.clamp_max(logits_RPGV.shape[-1] - 1)
        drawn_RPG = torch.where(self._ended_RPG, self.end, drawn_RPG)
        self._ended_RPG.logical_or_(drawn_RPG == self.end)
        self._token_RPG.copy_(drawn_RPG)
        self._found_TRPG.index_copy_(0, self._step, drawn_RPG[None])
        self._step.add_(1)

    def _capture(self) -> None:
        """Record one step. It is run a few times before, as capturing asks for; `_begin` undoes what it did."""
        self._begin(self.end)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._advance()
