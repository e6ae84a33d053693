"""The rivals, written anew from their papers: scores of tokens, of reported log-probabilities, and
of hidden states.

Every score grows with suspicion, and the mean over tokens is compared with a threshold.

- **Token-DiFR** (arXiv 2511.20621): the margin of the seeded sampling in units of logits, cut at
  0.5, which is also the score of a token that the verifier does not keep.
- **GLS** (arXiv 2511.02620): −ln Φ(−margin / (√2 σ)) of the same margin, where σ is the spread of
  honest logits.
- **Activation-DiFR** (2511.20621): L2 distance of random projections of the last hidden state,
  entries N(0, 1/k).
- **TOPLOC** (arXiv 2501.16007): the k largest values of 32 hidden states in bfloat16, as the
  coefficients of a polynomial through them. The verifier evaluates it at the places of its own k
  largest values and counts: exponents that differ, and the mean and the median difference of
  mantissas where they agree.
- **Log-probability distance** (the network's own validation): mean of |a − b| / (|a| + |b|) over
  the executor's five likeliest tokens, from raw log-probabilities.

Three of them are there twice: as published, and cut down to the bytes of a sketch. TOPLOC keeps
fewer values, with its limit for exponents in proportion; the others keep fewer tokens.

Legend of shapes: N tokens, V vocabulary, D hidden size, K reported tokens, C chunks of 32 tokens, P
places in a chunk.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE

CLIP = 0.5
CHUNK = SKETCH_EVERY
TOPLOC_TOP = 128
TOPLOC_LIMITS = (38.0, 10.0, 8.0)
"""Limits of the three counts for bfloat16 in the paper: exponents that differ, of 128, mean and
median of mantissas.
"""

MANTISSAS_DISAGREE = 128.0  # more than any difference of two mantissas of seven bits
SMALL_TOP = SKETCH_SIZE - 1  # values of a chunk in the bytes of a sketch: one number is the modulus
SMALL_EVERY = 27  # tokens of which one reports log-probabilities in as few bytes
WIDE = 8  # numbers of a projection of every token
REPORTED_BYTES = 20  # of five log-probabilities and ids, at two bytes each
_FARTHEST = 10.0  # in units of σ: what a token that is not kept counts for
_TINY = 1e-10

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reply:
    """One response, as the prover states it and as the verifier's prefill has it.

    Args:
        margins: Margins in units of logits, [N]; infinite for tokens that the verifier does not
            keep.
        logprobs: Log-probabilities of the likeliest tokens that the prover reports, [N, K].
        own_logprobs: Those of the same tokens that the verifier has, [N, K].
        states: Hidden states of the prover, [N, D].
        own_states: Hidden states of the verifier, [N, D].
        sigma: Spread of honest logits, as far as it is known.
    """

    margins: FloatArray
    logprobs: Tensor
    own_logprobs: Tensor
    states: Tensor
    own_states: Tensor
    sigma: float = 1.0


@dataclass(frozen=True)
class Rival:
    """A rival.

    Args:
        name: Name in tables.
        bytes_per_token: Bytes that are published per token beside the text.
        score: Function that scores the tokens of a response, [N]; not-a-number where nothing is
            published.
    """

    name: str
    bytes_per_token: float
    score: Callable[[Reply], FloatArray]


def token_difr(reply: Reply) -> FloatArray:
    """Return Token-DiFR's score of every token, [N]."""
    return np.minimum(reply.margins, CLIP)


def gumbel_likelihood(reply: Reply) -> FloatArray:
    """Return minus the Gumbel likelihood score of every token, [N]."""
    z_N = np.minimum(reply.margins / reply.sigma, _FARTHEST) / math.sqrt(2)
    return -np.asarray(special.log_ndtr(-z_N), dtype=np.float64)


def logit_spread(replies: Sequence[Reply]) -> float:
    """Return the root mean square error of the log-probabilities that honest replies report."""
    errors = [
        (reply.logprobs.double() - reply.own_logprobs.double()).square().mean() for reply in replies
    ]
    return float(torch.stack(errors).mean().sqrt())


def logprob_distance(reply: Reply) -> FloatArray:
    """Return the distance of the reported log-probabilities from the verifier's, for every token,
    [N].
    """
    own_NK = reply.own_logprobs.double()
    reported_NK = reply.logprobs.double()
    share_NK = (own_NK - reported_NK).abs() / (_TINY + own_NK.abs() + reported_NK.abs())
    return np.asarray(share_NK.mean(-1).cpu())


def activation_difr(reply: Reply, size: int) -> FloatArray:
    """Return the L2 distance of projections to ``size`` numbers of every hidden state, [N]."""
    generator = torch.Generator().manual_seed(size)
    projection_DK = torch.randn(reply.own_states.shape[1], size, generator=generator) / math.sqrt(
        size
    )
    published_NK = (reply.states.cpu() @ projection_DK).to(torch.float16)
    return np.asarray(
        (published_NK.double() - (reply.own_states.cpu() @ projection_DK).double()).norm(dim=-1)
    )


def toploc(reply: Reply, top: int = TOPLOC_TOP) -> FloatArray:
    """Return TOPLOC's three counts of every whole chunk, [C, 3]: exponents, mean and median of
    mantissas.

    Args:
        reply: Response.
        top: Number of values that are published for a chunk.
    """
    rng = np.random.default_rng(0)
    scores = []
    for start in range(0, len(reply.own_states) - CHUNK + 1, CHUNK):
        claimed_X, own_X = (
            states_ND[start : start + CHUNK].cpu().to(torch.bfloat16).flatten()
            for states_ND in (reply.states, reply.own_states)
        )
        places_P = np.asarray(own_X.abs().topk(top).indices)
        published_P = np.isin(places_P, np.asarray(claimed_X.abs().topk(top).indices))
        # Between its nodes, a polynomial over a prime field takes values that look drawn at random.
        bits_P = np.where(published_P, _bits(claimed_X)[places_P], rng.integers(0, 2**16, top))
        scores.append(_counts(bits_P, _bits(own_X)[places_P]))
    return np.array(scores).reshape(-1, 3)


def toploc_score(reply: Reply, top: int) -> FloatArray:
    """Return the largest of the three counts over its limit, at the last token of every chunk,
    [N].
    """
    counts_C3 = toploc(reply, top)
    scores_N = np.full(len(reply.own_states), np.nan)
    largest_C = (counts_C3 / (np.array(TOPLOC_LIMITS) * [top / TOPLOC_TOP, 1.0, 1.0])).max(-1)
    scores_N[CHUNK - 1 :: CHUNK][: len(largest_C)] = largest_C
    return scores_N


def _bits(x_X: Tensor) -> npt.NDArray[np.int64]:
    return np.asarray(x_X.view(torch.int16)).astype(np.int64) & 0xFFFF


def _counts(
    claimed_P: npt.NDArray[np.int64], own_P: npt.NDArray[np.int64]
) -> tuple[float, float, float]:
    same_P = (claimed_P >> 7 & 0xFF) == (own_P >> 7 & 0xFF)
    errors = np.abs((claimed_P & 0x7F) - (own_P & 0x7F))[same_P]
    if not errors.size:
        return float(same_P.size), MANTISSAS_DISAGREE, MANTISSAS_DISAGREE
    return float((~same_P).sum()), float(errors.mean()), float(np.median(errors))


def _sparse(score: Callable[[Reply], FloatArray], every: int) -> Callable[[Reply], FloatArray]:
    """Keep the score of one token in ``every``."""

    def kept(reply: Reply) -> FloatArray:
        scores_N = score(reply)
        return np.where(np.arange(len(scores_N)) % every == 0, scores_N, np.nan)

    return kept


RIVALS = (
    Rival("Token-DiFR", 0.0, token_difr),
    Rival("GLS", 0.0, gumbel_likelihood),
    Rival(
        "Activation-DiFR, 1 in 32",
        2 * SKETCH_SIZE / CHUNK,
        _sparse(lambda reply: activation_difr(reply, SKETCH_SIZE), CHUNK),
    ),
    Rival(
        "TOPLOC, top 11", 2 * (SMALL_TOP + 1) / CHUNK, lambda reply: toploc_score(reply, SMALL_TOP)
    ),
    Rival(
        "log-probabilities, 1 in 27",
        REPORTED_BYTES / SMALL_EVERY,
        _sparse(logprob_distance, SMALL_EVERY),
    ),
    Rival(
        "TOPLOC, top 128",
        2 * (TOPLOC_TOP + 1) / CHUNK,
        lambda reply: toploc_score(reply, TOPLOC_TOP),
    ),
    Rival("Activation-DiFR, each", 2.0 * WIDE, lambda reply: activation_difr(reply, WIDE)),
    Rival("log-probabilities, each", float(REPORTED_BYTES), logprob_distance),
)
"""Every rival, those that publish least first; the first five publish no more than we do."""
