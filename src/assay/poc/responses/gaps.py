"""How far a claimed token is from the verifier's scores, and its likelihood at every scale of honest differences.

The gap of a token is the least change of the logits with which it wins. Without a limit on the support that is its
margin: the largest score minus its own, times the temperature. With top-k, top-p or min-p two engines may also differ
in which tokens are kept, so a token with a larger score need not be overtaken if it nearly left the support, and a
token that nearly entered it is not impossible:

    gap(x) = max(enter(x), max over kept v with s_v > s_x of min(s_v − s_x, leave(v)))

``enter`` is how far x is from being kept and ``leave`` how far v is from being dropped, by the rule that is nearest.
For top-p the distance is that of the logits to the neighbour on the other side, or of the logarithm of the odds of the
sum that decides, whichever is smaller. Only the :data:`RIVALS` largest scores are looked at as v. The profile that
follows is a law of tokens whatever the gaps are (:mod:`assay.stats`): a coarser gap costs power, and no validity.

Shapes: N steps, V tokens of the vocabulary, G columns of a profile, R rivals.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.errors import UsageError
from assay.poc.responses.sampling import Sampling, check_biased, check_rows, counts_before, tokens_of
from assay.stats.tokens import COLUMNS, SCALES, round_profiles
from assay.streams.backends import as_tensor

# --------------------------------------------------------------------------------------------------
# The definition of :mod:`assay.poc.responses.sampling` over whole batches in torch, on the CPU and on CUDA.
#
# Every row may have parameters of its own. The bits are those of the definition, except for the tokens that top-p keeps:
# its sums are taken in another order, so a token whose sum is equal to top_p up to rounding may be kept or not.
#
# Shapes: N rows, V tokens of the vocabulary.

NUMBERS = 8
"""Numbers of a row of parameters."""

_TEMPERATURE, _REPETITION, _FREQUENCY, _PRESENCE, _LOG_MIN_P, _TOP_P, _TOP_K, _GREEDY = range(NUMBERS)


def numbers_of(sampling: Sampling) -> tuple[float, ...]:
    """Return the numbers of parameters as :meth:`Sampler.of_numbers` takes them; biases are not among them."""
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
    """Makes scores for rows of logits on one device.

    Args:
        samplings: Parameters of every row, or one set for all rows.
        vocab_size: Number V of logits of a row.
        device: Device that holds the logits.

    Raises:
        UsageError: A biased token is not in the vocabulary.
    """

    def __init__(self, samplings: Sequence[Sampling], vocab_size: int, device: torch.device | str) -> None:
        numbers = np.array([numbers_of(sampling) for sampling in samplings], np.float64)
        self._set(numbers.reshape(-1, NUMBERS), [sampling.logit_bias for sampling in samplings], vocab_size, device)

    @classmethod
    def of_numbers(
        cls,
        numbers_N8: NDArray[np.float64],
        biases: Sequence[Mapping[int, float]],
        vocab_size: int,
        device: torch.device | str,
    ) -> Self:
        """Return a sampler of rows whose numbers are at hand: an engine makes one whenever its batch changes.

        Args:
            numbers_N8: :func:`numbers_of` of every row.
            biases: Biases of every row; nothing if no row has any.
            vocab_size: Number V of logits of a row.
            device: Device that holds the logits.
        """
        made = cls.__new__(cls)
        made._set(numbers_N8, biases, vocab_size, device)
        return made

    def _set(
        self,
        numbers_N8: NDArray[np.float64],
        biases: Sequence[Mapping[int, float]],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self._streams = streams.get_backend("auto", str(self.device))
        self._count = len(numbers_N8)
        greedy_N = numbers_N8[:, _GREEDY] > 0
        drawn = numbers_N8[~greedy_N]
        self.penalises = bool((numbers_N8[:, _REPETITION : _PRESENCE + 1] != (1.0, 0.0, 0.0)).any())
        """Whether the scores of a row depend on the tokens before."""
        self._some_greedy, self._all_greedy = bool(greedy_N.any()), bool(greedy_N.all())
        self._scales = bool((drawn[:, _TEMPERATURE] != 1).any())
        self._uses_min_p = bool((drawn[:, _LOG_MIN_P] > -math.inf).any())
        self._uses_top_p = bool((drawn[:, _TOP_P] < 1).any())
        limits = drawn[:, _TOP_K]
        self._most_kept = int(limits[limits < vocab_size].max(initial=0))
        # One copy to the device for all: columns of float32 are rounded there, once.
        self._numbers_N8 = to_device(numbers_N8, self.device)
        self._floats_N8 = self._numbers_N8.float()
        self._biases = self._bias_columns(biases)

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
        if self._count != 1:
            check_rows(tuple(logits_NV.shape), self._count)
        l_NV = logits_NV.float()
        if self._biases is not None:
            tokens_NK, biases_NK = (values.expand(len(l_NV), -1) for values in self._biases)
            l_NV = l_NV.scatter_add(1, tokens_NK, biases_NK)
        if not self.penalises:
            return l_NV
        counts = torch.zeros((1, 1), device=self.device) if counts_NV is None else counts_NV.to(torch.float32)
        used = counts > 0
        seen = used if prompt_NV is None else used | prompt_NV
        repetition_N1 = self._column(_REPETITION)
        penalty = torch.where(l_NV > 0, l_NV / repetition_N1, l_NV * repetition_N1)
        l_NV = torch.where(seen, penalty, l_NV)
        # Eager operations, so that no product and difference are fused into one rounding.
        l_NV = l_NV - self._column(_FREQUENCY) * counts
        return l_NV - self._column(_PRESENCE) * used.to(torch.float32)

    def noisy(
        self, l_NV: Float32[Tensor, "N V"], seeds_N: NDArray[np.uint32] | Tensor, *, in_place: bool = False
    ) -> Float32[Tensor, "N V"]:
        """Return the scores that follow from l of step 2: steps 3 to 7; a greedy row stays as it is.

        With ``in_place`` they may take the place of l, which saves a copy of all logits.
        """
        check_rows(tuple(l_NV.shape), len(seeds_N))
        if self._all_greedy:
            return l_NV
        over = in_place and not self._some_greedy
        z_NV = l_NV
        if self._scales:  # x / 1 is x
            temperature_N1 = self._column(_TEMPERATURE)
            z_NV = l_NV.div_(temperature_N1) if over else l_NV / temperature_N1
        if self._uses_min_p or self._uses_top_p or self._most_kept:
            s_NV = z_NV.masked_fill(~self._kept(z_NV), -math.inf)
        else:
            s_NV = z_NV.clone() if z_NV is l_NV and not over else z_NV
        self._streams.add_gumbels(s_NV, as_tensor(seeds_N).to(self.device))
        return torch.where(self._numbers_N8[:, _GREEDY:] > 0, l_NV, s_NV) if self._some_greedy else s_NV

    def _kept(self, z_NV: Tensor) -> Tensor:
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
            sorted_NV = sorted_NV.to(torch.float64)
            sums_NV = torch.exp(sorted_NV - sorted_NV[:, :1]).cumsum(dim=1)
            before_NV = torch.nn.functional.pad(sums_NV[:, :-1], (1, 0), value=-1.0)
            top_p_N1 = self._numbers_N8[:, _TOP_P : _TOP_P + 1]
            stays_NV = (before_NV < top_p_N1 * sums_NV[:, -1:]) | (top_p_N1 >= 1)
            kept_NV &= torch.empty_like(kept_NV).scatter_(1, order_NV, stays_NV)
        return kept_NV

    def rows(self, index_R: Int[Tensor, " R"]) -> "Sampler":
        """Return the sampler of other rows: row i of it has the parameters of row ``index_R[i]`` here.

        The indices may be known on the device only, as those of an engine with drafts are: nothing waits for them.
        """
        other = copy.copy(self)
        other._count = len(index_R)
        other._numbers_N8, other._floats_N8 = (
            values.index_select(0, index_R) for values in (self._numbers_N8, self._floats_N8)
        )
        if self._biases is not None:
            tokens_NK, biases_NK = self._biases
            other._biases = tokens_NK.index_select(0, index_R), biases_NK.index_select(0, index_R)
        return other

    def _bias_columns(self, given: Sequence[Mapping[int, float]]) -> tuple[Tensor, Tensor] | None:
        """Return biased tokens [N, K] and their biases; a row with fewer than K adds 0 to the first token."""
        for biases in given:
            check_biased(biases, self.vocab_size)
        most = max(map(len, given), default=0)
        if not most:
            return None
        padded = [[*biases.items(), *[(0, 0.0)] * most][:most] for biases in given]
        tokens = [[token for token, _ in row] for row in padded]
        values = [[bias for _, bias in row] for row in padded]
        return to_device(tokens, self.device), to_device(torch.tensor(values, dtype=torch.float32), self.device)


def to_device(values: Tensor | NDArray[Any] | Sequence[Any], device: torch.device) -> Tensor:
    """Copy values to a device without waiting for it."""
    made = torch.as_tensor(values)
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


RIVALS = 8
"""Number of larger scores that may have left the support."""

_AT_ONCE = 2**22  # scores that are held at a time
_NEAR = 64  # smallest gaps that decide a profile, where the rest adds less than a billionth
_NEGLIGIBLE = 25.0  # in natural logarithms
_SQUARINGS = 12  # in a row, each of which doubles the error of float32: less than the step of float16 in the end


@dataclass(frozen=True, eq=False)
class Margins:
    """What the tokens of one response show.

    Args:
        margins: Largest score minus that of the claimed token, [N]; 0 where it is the verifier's own token, infinite
            where the verifier would not have kept it.
        profiles: Log-probability of the claimed tokens at every scale, [N, G], as it is stored.
    """

    margins: NDArray[np.float32]
    profiles: NDArray[np.float64]


def measure_margins(
    logits_NV: Float32[Tensor, "N V"],
    output: tuple[int, ...],
    sampling: Sampling,
    seeds_N: NDArray[np.uint32],
    *,
    prompt: tuple[int, ...] = (),
    whole: bool = True,
) -> Margins:
    """Measure how far the tokens of a response are from those that these logits give.

    Args:
        logits_NV: Raw logits that gave the tokens, by a prefill.
        output: Tokens of the response.
        sampling: Parameters of sampling.
        seeds_N: Seeds of the steps.
        prompt: Tokens of the prompt, which penalties may need.
        whole: Whether the engine gave the logits of all tokens; those that it did not give are -inf.

    Raises:
        UsageError: It did not, and what is missing may say which tokens top-p keeps.
    """
    vocabulary = logits_NV.shape[1]
    rows = max(1, _AT_ONCE // vocabulary)
    prompt_V = as_tensor(tokens_of(prompt, vocabulary)).to(logits_NV.device) if sampling.penalises else None
    margins, profiles = [], []
    for start in range(0, len(output), rows):
        stop = min(start + rows, len(output))
        counts_NV = None
        if sampling.penalises:
            counts_NV = as_tensor(counts_before(output, vocabulary, start, stop)).to(logits_NV.device)
        sampler = Sampler([sampling] * (stop - start), vocabulary, logits_NV.device)
        l_NV = sampler.penalised(logits_NV[start:stop], prompt_NV=prompt_V, counts_NV=counts_NV)
        if not whole:
            _check_top_p(l_NV, sampling)
        s_NV = sampler.noisy(l_NV, seeds_N[start:stop])
        tokens_N = torch.tensor(output[start:stop], device=l_NV.device)
        gaps_NV = _gaps(l_NV, s_NV, sampling, seeds_N[start:stop])
        own_N = s_NV.gather(1, tokens_N[:, None])[:, 0]
        margins.append((s_NV.amax(dim=1) - own_N).cpu().numpy())
        profiles.append(_profiles(gaps_NV, tokens_N).cpu().numpy())
    if not margins:
        return Margins(np.zeros(0, np.float32), np.zeros((0, COLUMNS)))
    return Margins(np.concatenate(margins), round_profiles(np.concatenate(profiles)))


def _check_top_p(l_NV: Float32[Tensor, "N V"], sampling: Sampling) -> None:
    """Refuse logits of the likeliest tokens alone where the sum of the others may move the border of top-p.

    A border that is drawn too near makes tokens impossible that an honest node may take. The others have at most the
    smallest logit of the likeliest, which bounds their sum.
    """
    known_N = (l_NV > -math.inf).sum(dim=1)
    if sampling.greedy or sampling.top_p == 1 or 0 < sampling.top_k < int(known_N.min()):
        return
    sorted_NV = (l_NV.double() / sampling.temperature).sort(dim=1, descending=True).values
    weights_NV = (sorted_NV - sorted_NV[:, :1]).exp()
    weights_NV = torch.where(weights_NV < sampling.min_p, 0.0, weights_NV)
    # The claimed token is given wherever it stands: the last but one bounds those that were not given.
    smallest_N = weights_NV.gather(1, (known_N - 2).clamp(min=0)[:, None])[:, 0]
    others_N = (l_NV.shape[1] - known_N) * smallest_N
    sums_NV = weights_NV.cumsum(dim=1)
    near_N, far_N = (
        (sums_NV < sampling.top_p * total_N[:, None]).sum(dim=1)
        for total_N in (sums_NV[:, -1], sums_NV[:, -1] + others_N)
    )
    if not torch.equal(near_N, far_N):
        raise UsageError(
            f"a response with top_p {sampling.top_p} and temperature {sampling.temperature}, of which the engine gave "
            f"{int(known_N.min())} of {l_NV.shape[1]} logits",
            wanted="the logits of all tokens that top-p adds up",
            do="replay it with --engine hf",
        )


def _gaps(
    l_NV: Float32[Tensor, "N V"], s_NV: Float32[Tensor, "N V"], sampling: Sampling, seeds_N: NDArray[np.uint32]
) -> Float64[Tensor, "N V"]:
    """Return the gap of every token in units of the logits."""
    limited = not sampling.greedy and (sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0)
    if not limited:
        scores = s_NV.double()
        unit = 1.0 if sampling.greedy else sampling.temperature
        return (scores.amax(dim=1, keepdim=True) - scores) * unit
    unlimited = replace(sampling, top_k=0, top_p=1.0, min_p=0.0)
    whole_NV = Sampler([unlimited] * len(l_NV), l_NV.shape[1], l_NV.device).noisy(l_NV, seeds_N).double()
    z_NV = l_NV.double() / sampling.temperature
    kept_NV = s_NV > -math.inf
    enter_NV, leave_NV = _borders(z_NV, kept_NV, sampling)
    rivals = min(RIVALS, l_NV.shape[1])
    rival_NR, at_NR = torch.where(kept_NV, whole_NV, -math.inf).topk(rivals, dim=1)
    gaps_NV = enter_NV
    for place in range(rivals):
        ahead_NV = rival_NR[:, place : place + 1] - whole_NV
        needed_NV = torch.minimum(ahead_NV, leave_NV.gather(1, at_NR[:, place : place + 1]))
        gaps_NV = torch.maximum(gaps_NV, torch.where(ahead_NV > 0, needed_NV, 0.0))
    # A token that a grammar or a list of likeliest ones leaves out has no neighbours, and no change lets it in.
    return torch.where(z_NV > -math.inf, gaps_NV, math.inf) * sampling.temperature


def _borders(
    z_NV: Float64[Tensor, "N V"], kept_NV: Tensor, sampling: Sampling
) -> tuple[Float64[Tensor, "N V"], Float64[Tensor, "N V"]]:
    """Return how far tokens are from being kept, 0 for those that are, and how far from being dropped."""
    nothing = torch.zeros_like(z_NV)
    enter_NV, leave_NV = nothing, nothing + math.inf
    left_NV = z_NV > -math.inf
    if sampling.min_p > 0:
        above_NV = z_NV - (z_NV.amax(dim=1, keepdim=True) + math.log(sampling.min_p))
        enter_NV, leave_NV = torch.maximum(enter_NV, -above_NV), torch.minimum(leave_NV, above_NV)
        left_NV &= above_NV >= 0
    if 0 < sampling.top_k < z_NV.shape[1]:
        largest = torch.where(left_NV, z_NV, -math.inf).topk(sampling.top_k + 1, dim=1).values
        enter_NV = torch.maximum(enter_NV, largest[:, -2:-1] - z_NV)
        leave_NV = torch.minimum(leave_NV, z_NV - largest[:, -1:])
        left_NV &= z_NV >= largest[:, -2:-1]
    if sampling.top_p < 1:
        sorted_NV, order_NV = torch.where(left_NV, z_NV, -math.inf).sort(dim=1, descending=True, stable=True)
        before_NV = torch.softmax(sorted_NV, dim=1).cumsum(dim=1).roll(1, dims=1)
        before_NV[:, 0] = 0
        odds_NV = torch.logit(before_NV.clamp(0, 1)) - math.log(sampling.top_p / (1 - sampling.top_p))
        odds_NV = torch.empty_like(odds_NV).scatter_(1, order_NV, odds_NV)
        last_N1 = torch.where(kept_NV, z_NV, math.inf).amin(dim=1, keepdim=True)
        next_N1 = torch.where(kept_NV, -math.inf, z_NV).amax(dim=1, keepdim=True)
        inside = torch.minimum(-odds_NV, z_NV - next_N1)
        outside = torch.minimum(odds_NV.clamp(min=0), (last_N1 - z_NV).clamp(min=0))
        enter_NV = torch.maximum(enter_NV, torch.where(kept_NV, 0.0, outside))
        leave_NV = torch.minimum(leave_NV, inside)
    return torch.where(kept_NV, 0.0, enter_NV), leave_NV.clamp(min=0)


def _profiles(gaps_NV: Float[Tensor, "N V"], tokens_N: Tensor) -> Float64[Tensor, "N G"]:
    """Return the profiles of claimed tokens: the twin of :func:`assay.stats.token_profile` for devices.

    At small scales only the smallest gaps count. At large ones exp(−gap/σ) is the square of that at 2σ.
    """
    own_N = gaps_NV.gather(1, tokens_N[:, None])[:, 0].double()
    vocabulary = gaps_NV.shape[1]
    near_NK = gaps_NV.topk(min(_NEAR, vocabulary), dim=1, largest=False).values.double()
    enough = float(near_NK[:, -1].min()) / (math.log(vocabulary) + _NEGLIGIBLE)
    power_NV = torch.exp(-gaps_NV.float() / SCALES[-1])
    columns = []
    for squared, scale in enumerate(SCALES[::-1]):
        if scale <= enough or len(near_NK[0]) == vocabulary:
            total_N = torch.logsumexp(-near_NK / scale, dim=1)
        elif squared < _SQUARINGS:
            total_N = power_NV.sum(dim=1, dtype=torch.float64).log()
            power_NV.square_()
        else:
            total_N = torch.logsumexp(-gaps_NV.double() / scale, dim=1)
        columns.append(-own_N / scale - total_N)
    return torch.stack([*columns[::-1], torch.full_like(own_N, -math.log(vocabulary))], dim=1)
