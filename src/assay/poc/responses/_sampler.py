"""The definition of :mod:`assay.poc.responses._sampling` over whole batches in torch, on the CPU and on CUDA.

Every row may have parameters of its own. The bits are those of the definition, except for the tokens that top-p keeps:
its sums are taken in another order, so a token whose sum is equal to top_p up to rounding may be kept or not.

Shapes: N rows, V tokens of the vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.poc.responses._sampling import Sampling, check_biased, check_rows


class Sampler:
    """Makes scores for rows of logits on one device.

    Args:
        samplings: Parameters of every row, or one set for all rows.
        vocab_size: Number V of logits of a row.
        device: Device that holds the logits.

    Raises:
        UsageError: A biased token is not in the vocabulary.
    """

    def __init__(self, samplings: Sequence[Sampling], vocab_size: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self._streams = streams.get_backend("auto", str(self.device))
        self._samplings = tuple(samplings)
        self._biases = self._bias_columns()
        self.penalises = any(sampling.penalises for sampling in self._samplings)
        """Whether the scores of a row depend on the tokens before."""
        self._greedy_N1 = self._column([sampling.greedy for sampling in self._samplings], torch.bool)
        self._some_greedy = any(sampling.greedy for sampling in self._samplings)
        self._all_greedy = all(sampling.greedy for sampling in self._samplings)
        self._temperature_N1 = self._floats([sampling.temperature or 1.0 for sampling in self._samplings])
        self._repetition_N1 = self._floats([sampling.repetition_penalty for sampling in self._samplings])
        self._frequency_N1 = self._floats([sampling.frequency_penalty for sampling in self._samplings])
        self._presence_N1 = self._floats([sampling.presence_penalty for sampling in self._samplings])
        drawn = [sampling for sampling in self._samplings if not sampling.greedy]
        self._uses_min_p = any(sampling.min_p > 0 for sampling in drawn)
        self._uses_top_p = any(sampling.top_p < 1 for sampling in drawn)
        limits = [sampling.min_p for sampling in self._samplings]
        self._min_p_N1 = self._floats([math.log(limit) if limit > 0 else -math.inf for limit in limits])
        kept = [min(sampling.top_k or vocab_size, vocab_size) for sampling in self._samplings]
        self._most_kept = max([0, *(k for k in kept if k < vocab_size)])
        self._top_k_N1 = self._column(kept, torch.int64)
        self._top_p_N1 = self._column([sampling.top_p for sampling in self._samplings], torch.float64)

    def scores(
        self,
        logits_NV: Float[Tensor, "N V"],
        seeds_N: NDArray[np.uint32] | Tensor,
        *,
        prompt_NV: Bool[Tensor, "*#N V"] | None = None,
        counts_NV: Int[Tensor, "N V"] | None = None,
    ) -> Float32[Tensor, "N V"]:
        """Return s of step 7 for every row, or l of step 2 of a greedy row; -inf where a token is not kept.

        Args:
            logits_NV: Raw logits.
            seeds_N: Seeds of the steps, in numpy or on the device.
            prompt_NV: Tokens that are in the prompt, [V] or [N, V]; None for no token.
            counts_NV: Times that a token is in the output before the step; None for 0.

        Raises:
            UsageError: The logits do not have a row for each seed and each set of parameters.
        """
        return self.noisy(self.penalised(logits_NV, prompt_NV=prompt_NV, counts_NV=counts_NV), seeds_N)

    def penalised(
        self,
        logits_NV: Float[Tensor, "N V"],
        *,
        prompt_NV: Bool[Tensor, "*#N V"] | None = None,
        counts_NV: Int[Tensor, "N V"] | None = None,
    ) -> Float32[Tensor, "N V"]:
        """Return l of step 2: the logits with bias and penalties."""
        if len(self._samplings) != 1:
            check_rows(tuple(logits_NV.shape), len(self._samplings))
        l_NV = logits_NV.float()
        if self._biases is not None:
            tokens_NK, biases_NK = (values.expand(len(l_NV), -1) for values in self._biases)
            l_NV = l_NV.scatter_add(1, tokens_NK, biases_NK)
        if not self.penalises:
            return l_NV
        counts = torch.zeros((1, 1), device=self.device) if counts_NV is None else counts_NV.to(torch.float32)
        used = counts > 0
        seen = used if prompt_NV is None else used | prompt_NV
        penalty = torch.where(l_NV > 0, l_NV / self._repetition_N1, l_NV * self._repetition_N1)
        l_NV = torch.where(seen, penalty, l_NV)
        # Eager operations, so that no product and difference are fused into one rounding.
        l_NV = l_NV - self._frequency_N1 * counts
        return l_NV - self._presence_N1 * used.to(torch.float32)

    def noisy(self, l_NV: Float32[Tensor, "N V"], seeds_N: NDArray[np.uint32] | Tensor) -> Float32[Tensor, "N V"]:
        """Return the scores that follow from l of step 2: steps 3 to 7; a greedy row stays as it is."""
        check_rows(tuple(l_NV.shape), len(seeds_N))
        if self._all_greedy:
            return l_NV
        z_NV = l_NV / self._temperature_N1
        drops = self._uses_min_p or self._uses_top_p or self._most_kept
        s_NV = z_NV.masked_fill(~self._kept(z_NV), -math.inf) if drops else z_NV
        self._streams.add_gumbels(s_NV, streams.as_tensor(seeds_N).to(self.device))
        return torch.where(self._greedy_N1, l_NV, s_NV) if self._some_greedy else s_NV

    def _kept(self, z_NV: Tensor) -> Tensor:
        kept_NV = z_NV > -math.inf
        if self._uses_min_p:
            kept_NV &= z_NV >= z_NV.amax(dim=1, keepdim=True) + self._min_p_N1
        if self._most_kept:
            left_NV = z_NV.masked_fill(~kept_NV, -math.inf)
            largest_NK = left_NV.topk(self._most_kept, dim=1).values
            place_N1 = (self._top_k_N1 - 1).clamp(max=self._most_kept - 1).expand(len(z_NV), 1)
            last_N1 = largest_NK.gather(1, place_N1)
            kept_NV &= (z_NV >= last_N1) | (self._top_k_N1 == self.vocab_size)
        if self._uses_top_p:
            left_NV = z_NV.masked_fill(~kept_NV, -math.inf)
            sorted_NV, order_NV = left_NV.sort(dim=1, descending=True, stable=True)
            sorted_NV = sorted_NV.to(torch.float64)
            sums_NV = torch.exp(sorted_NV - sorted_NV[:, :1]).cumsum(dim=1)
            before_NV = torch.nn.functional.pad(sums_NV[:, :-1], (1, 0), value=-1.0)
            stays_NV = (before_NV < self._top_p_N1 * sums_NV[:, -1:]) | (self._top_p_N1 >= 1)
            kept_NV &= torch.empty_like(kept_NV).scatter_(1, order_NV, stays_NV)
        return kept_NV

    def rows(self, index_R: Int[Tensor, " R"]) -> "Sampler":
        """Return the sampler of other rows: row i of it has the parameters of row ``index_R[i]`` here.

        The indices may be known on the device only, as those of an engine with drafts are: nothing waits for them.
        """
        other = copy.copy(self)
        other._samplings = self._samplings[:1] * len(index_R)  # their number counts; which is which the columns say
        for name, column in vars(self).items():
            if name.endswith("_N1"):
                setattr(other, name, column.index_select(0, index_R))
        if self._biases is not None:
            tokens_NK, biases_NK = self._biases
            other._biases = tokens_NK.index_select(0, index_R), biases_NK.index_select(0, index_R)
        return other

    def _bias_columns(self) -> tuple[Tensor, Tensor] | None:
        """Return biased tokens [N, K] and their biases; a row with fewer than K adds 0 to the first token."""
        for sampling in self._samplings:
            check_biased(sampling, self.vocab_size)
        most = max((len(sampling.logit_bias) for sampling in self._samplings), default=0)
        if not most:
            return None
        padded = [[*sampling.logit_bias.items(), *[(0, 0.0)] * most][:most] for sampling in self._samplings]
        tokens = [[token for token, _ in row] for row in padded]
        biases = [[bias for _, bias in row] for row in padded]
        return self._put(torch.tensor(tokens)), self._put(torch.tensor(biases, dtype=torch.float32))

    def _floats(self, values: Sequence[float]) -> Tensor:
        return self._column(values, torch.float32)

    def _column(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return self._put(torch.tensor(values, dtype=dtype).unsqueeze(1))

    def _put(self, values: Tensor) -> Tensor:
        """Copy values to the device without waiting for it."""
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device, non_blocking=True)
