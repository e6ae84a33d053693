"""Token sampling from logits and seeded noise, in batches; docs/responses.md defines it.

The order of the steps, in float32 on the raw logits l, where a token that a grammar forbids is -inf
and stays so:

1. the bias of a token is added;
2. penalties: of repetition for tokens of prompt and output (l > 0 → l / r, else l · r), then of
   frequency (f times the count in the output is subtracted), then of presence (p is subtracted for
   tokens of the output);
3. z = l / temperature;
4. min-p drops z < max z + ln min_p;
5. top-k drops z < the k-th largest; equal ones stay;
6. top-p sorts the softmax of what is left, in float64, from the largest, equal ones by their ids,
   and keeps the shortest beginning whose sum is at least top_p;
7. s = z + Gumbel number of (seed of the step, token);
8. the token is the one with the largest s; of equal ones the lowest id.

At temperature 0 the token is the one with the largest l of step 2: no noise, and no steps 3 to 7.

Every row may have parameters of its own. The bits are those of the definition, except for the
tokens that top-p keeps: its sums are taken in another order, so a token whose sum equals top_p up
to rounding may be kept or not.

Shapes: N rows, V tokens of the vocabulary.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.errors import UsageError
from assay.models.device import to_device
from assay.poc.responses.sampling import Sampling
from assay.streams.arrays import as_tensor

_TEMPERATURE, _REPETITION, _FREQUENCY, _PRESENCE, _LOG_MIN_P, _TOP_P, _TOP_K, _GREEDY = range(8)


def _numbers_of(sampling: Sampling) -> tuple[float, ...]:
    """Return the parameters as numbers; biases are not among them."""
    return (
        sampling.temperature or 1.0,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
        sampling.top_p,
        sampling.top_k,
        sampling.greedy,
    )


class Sampler:
    """Makes scores for rows of V logits on one device.

    Args:
        samplings: Parameters of every row, or one set for all rows.

    Raises:
        UsageError: A biased token is not in the vocabulary.
    """

    def __init__(
        self, samplings: Sequence[Sampling], vocab_size: int, device: torch.device | str
    ) -> None:
        numbers_N8 = np.array(
            [_numbers_of(sampling) for sampling in samplings], np.float64
        ).reshape(-1, _GREEDY + 1)
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self._streams = streams.get_backend("auto", str(self.device))
        self._count = len(numbers_N8)
        greedy_N = numbers_N8[:, _GREEDY] > 0
        drawn = numbers_N8[~greedy_N]
        self.penalises = bool((numbers_N8[:, _REPETITION : _PRESENCE + 1] != (1.0, 0.0, 0.0)).any())
        """Whether the scores of a row depend on the tokens before."""
        self._some_greedy = bool(greedy_N.any())
        self._all_greedy = bool(greedy_N.all())
        self._scales = bool((drawn[:, _TEMPERATURE] != 1).any())
        self._uses_min_p = bool((drawn[:, _LOG_MIN_P] > -math.inf).any())
        self._uses_top_p = bool((drawn[:, _TOP_P] < 1).any())
        limits = drawn[:, _TOP_K]
        self._most_kept = int(limits[limits < vocab_size].max(initial=0))
        # One copy to the device for all: columns of float32 are rounded there, once.
        self._numbers_N8 = to_device(numbers_N8, self.device)
        self._floats_N8 = self._numbers_N8.float()
        self._biases = self._bias_columns([sampling.logit_bias for sampling in samplings])

    def _column(self, which: int) -> Tensor:
        """Return a parameter of every row as float32, [N, 1]."""
        return self._floats_N8[:, which : which + 1]

    def scores(
        self,
        logits_NV: Float[Tensor, "N V"],
        seeds_N: NDArray[np.uint32] | Tensor,
        *,
        prompt_NV: Bool[Tensor, "*#N V"] | None = None,
        counts_NV: Int[Tensor, "N V"] | None = None,
    ) -> Float32[Tensor, "N V"]:
        """Return s of step 7 per row (l of step 2 if greedy); -inf for dropped tokens.

        Seeds are in numpy or on the device. A prompt is [V] or [N, V]; counts are those of the
        output before the step.

        Raises:
            UsageError: The logits do not have a row for each seed and each set of parameters.
        """
        return self.add_noise(
            self.penalise(logits_NV, prompt_NV=prompt_NV, counts_NV=counts_NV), seeds_N
        )

    def penalise(
        self,
        logits_NV: Float[Tensor, "N V"],
        *,
        prompt_NV: Bool[Tensor, "*#N V"] | None = None,
        counts_NV: Int[Tensor, "N V"] | None = None,
    ) -> Float32[Tensor, "N V"]:
        """Return l of step 2: the logits with bias and penalties."""
        if self._count != 1:
            _check_rows(tuple(logits_NV.shape), self._count)
        l_NV = logits_NV.float()
        if self._biases is not None:
            tokens_NK, biases_NK = (values.expand(len(l_NV), -1) for values in self._biases)
            l_NV = l_NV.scatter_add(1, tokens_NK, biases_NK)
        if not self.penalises:
            return l_NV
        counts = (
            torch.zeros((1, 1), device=self.device)
            if counts_NV is None
            else counts_NV.to(torch.float32)
        )
        used = counts > 0
        penalised = used if prompt_NV is None else used | prompt_NV
        repetition_N1 = self._column(_REPETITION)
        penalty = torch.where(l_NV > 0, l_NV / repetition_N1, l_NV * repetition_N1)
        l_NV = torch.where(penalised, penalty, l_NV)
        # Eager operations, so that no product and difference are fused into one rounding.
        l_NV = l_NV - self._column(_FREQUENCY) * counts
        return l_NV - self._column(_PRESENCE) * used.to(torch.float32)

    def add_noise(
        self,
        l_NV: Float32[Tensor, "N V"],
        seeds_N: NDArray[np.uint32] | Tensor,
        *,
        in_place: bool = False,
    ) -> Float32[Tensor, "N V"]:
        """Return the scores of steps 3 to 7 from l of step 2; greedy rows stay as they are.

        With ``in_place`` they may take the place of l, which saves a copy of all logits.
        """
        _check_rows(tuple(l_NV.shape), len(seeds_N))
        if self._all_greedy:
            return l_NV
        over = in_place and not self._some_greedy
        z_NV = l_NV
        if self._scales:  # x / 1 is x
            temperature_N1 = self._column(_TEMPERATURE)
            z_NV = l_NV.div_(temperature_N1) if over else l_NV / temperature_N1
        if self._uses_min_p or self._uses_top_p or self._most_kept:
            s_NV = z_NV.masked_fill(~self._find_kept(z_NV), -math.inf)
        else:
            s_NV = z_NV.clone() if z_NV is l_NV and not over else z_NV
        self._streams.add_gumbels(s_NV, as_tensor(seeds_N).to(self.device))
        return (
            torch.where(self._numbers_N8[:, _GREEDY:] > 0, l_NV, s_NV)
            if self._some_greedy
            else s_NV
        )

    def _find_kept(self, z_NV: Tensor) -> Tensor:
        kept_NV = z_NV > -math.inf
        if self._uses_min_p:
            kept_NV &= z_NV >= z_NV.amax(dim=1, keepdim=True) + self._column(_LOG_MIN_P)
        if self._most_kept:
            left_NV = z_NV.masked_fill(~kept_NV, -math.inf)
            largest_NK = left_NV.topk(self._most_kept, dim=1).values
            top_k_N1 = self._numbers_N8[:, _TOP_K : _TOP_K + 1].long()
            place_N1 = (top_k_N1 - 1).clamp(0, self._most_kept - 1).expand(len(z_NV), 1)
            last_N1 = largest_NK.gather(1, place_N1)
            kept_NV &= (z_NV >= last_N1) | (top_k_N1 == 0) | (top_k_N1 >= self.vocab_size)
        if self._uses_top_p:
            left_NV = z_NV.masked_fill(~kept_NV, -math.inf)
            sorted_NV, order_NV = left_NV.sort(dim=1, descending=True, stable=True)
            # Sums over a vocabulary in float32 would round tokens in or out.
            sorted_NV = sorted_NV.to(torch.float64)
            sums_NV = torch.exp(sorted_NV - sorted_NV[:, :1]).cumsum(dim=1)
            before_NV = torch.nn.functional.pad(sums_NV[:, :-1], (1, 0), value=-1.0)
            top_p_N1 = self._numbers_N8[:, _TOP_P : _TOP_P + 1]
            stays_NV = (before_NV < top_p_N1 * sums_NV[:, -1:]) | (top_p_N1 >= 1)
            kept_NV &= torch.empty_like(kept_NV).scatter_(1, order_NV, stays_NV)
        return kept_NV

    def rows(self, index_R: Int[Tensor, " R"]) -> "Sampler":
        """Return the sampler of other rows: row i of it has the parameters of row ``index_R[i]``
        here.

        The indices may be known on the device only, as those of an engine with drafts are: nothing
        waits for them.
        """
        sampler = copy.copy(self)
        sampler._count = len(index_R)
        sampler._numbers_N8, sampler._floats_N8 = (
            values.index_select(0, index_R) for values in (self._numbers_N8, self._floats_N8)
        )
        if self._biases is not None:
            tokens_NK, biases_NK = self._biases
            sampler._biases = tokens_NK.index_select(0, index_R), biases_NK.index_select(0, index_R)
        return sampler

    def _bias_columns(
        self, biases_by_row: Sequence[Mapping[int, float]]
    ) -> tuple[Tensor, Tensor] | None:
        """Return biased tokens [N, K] and their biases; a row with fewer than K adds 0 to the first
        token.
        """
        if (
            beyond := max((token for biases in biases_by_row for token in biases), default=0)
        ) >= self.vocab_size:
            raise UsageError(
                f"a logit_bias of token {beyond}",
                wanted=f"a token below {self.vocab_size}, the size of the vocabulary",
                do="leave it out of logit_bias",
            )
        if not (most := max(map(len, biases_by_row), default=0)):
            return None
        padded = [[*biases.items(), *[(0, 0.0)] * most][:most] for biases in biases_by_row]
        tokens = [[token for token, _ in row] for row in padded]
        values = [[bias for _, bias in row] for row in padded]
        return to_device(tokens, self.device), to_device(
            torch.tensor(values, dtype=torch.float32), self.device
        )


def _check_rows(shape: tuple[int, ...], seeds: int) -> None:
    """Refuse logits that are not [N, V] with a row for each of N seeds."""
    if len(shape) != 2 or shape[0] != seeds:
        raise UsageError(
            f"logits of shape {tuple(shape)} with {seeds} seeds",
            wanted="a row of logits for every seed",
            do="pass logits [N, V] and seeds [N]",
        )
