"""What the sequential tests share: decisions by e-values, and grids of cheats.

The bound of a false accusation holds however long one looks, because E is a non-negative martingale
from 1 under honest noise, and P(sup_n E_n ≥ 1/α) ≤ α (Ville 1939; Ramdas, Grünwald, Vovk and Shafer
2023).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from assay.errors import UsageError
from assay.stats.chord import FloatArray

Decision = Literal["honest", "fraud", "undecided"]
"""What a sequential test decides, or that it goes on."""

Outcome = Decision | Literal["faulty"]
"""A decision, or that residuals depend on the place in the batch, and are honest elsewhere."""

CHEAP = 5.0
"""Multiple of honest noise from which a share of the nonces counts as computed cheaply."""

FAR = 16.0
"""Multiple of honest noise beyond which neighbours on the grid are further apart."""


def decide(log_e_max: float, log_evidence_honest: float, *, alpha: float, beta: float) -> Decision:
    """Return ``fraud`` if log_e_max ≥ ln 1/α, ``honest`` if the evidence ≥ ln 1/β, or neither."""
    if log_e_max >= -math.log(alpha):
        return "fraud"
    if log_evidence_honest >= -math.log(beta):
        return "honest"
    return "undecided"


def grid_of_multiples(low: float, high: float, also: Sequence[float] = ()) -> FloatArray:
    """Return the multiples from ``low`` to ``high`` and ``also``, in ascending order, [M].

    Neighbours are at most a factor of two apart, and of four beyond `FAR`, where honest noise
    explains no multiple. Between neighbours little evidence per value is lost, and every further
    multiple takes weight from the others.
    """
    middle = max(min(FAR, high), low)
    return np.unique(
        np.concatenate([_geometric(low, middle, 2.0), _geometric(middle, high, 4.0), also])
    )


def _geometric(low: float, high: float, factor: float) -> FloatArray:
    if low >= high:
        return np.ones(0)
    steps = math.ceil(math.log(high / low) / math.log(factor))
    return np.geomspace(low, high, steps + 1)


def log_sum(logs: FloatArray) -> FloatArray:
    """Return the logarithm of the sum of exp over the last axis, whose values are finite."""
    # scipy.special.logsumexp takes 5 to 40 times as long at the sizes of the tests.
    top = logs.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(logs - top).sum(axis=-1)), dtype=np.float64)


def check_rates(alpha: float, beta: float, effect: float) -> None:
    """Refuse error rates and a multiple of noise that no test can have, with a UsageError."""
    if not (0 < alpha < 1 and 0 < beta < 1 and 1 < effect < math.inf):
        raise UsageError(
            f"alpha {alpha}, beta {beta}, effect {effect}",
            wanted="alpha and beta in (0, 1), effect above 1",
            do="use 1e-3, 1e-2, and an effect of 4 for distances or 2 for vectors",
        )


@dataclass(frozen=True, slots=True)
class EValueResult:
    """The result of every sequential test; logarithms are natural ones.

    Args:
        verdict: Decision by :func:`decide`.
        n: Number of values taken, non-finite ones included; of responses, of their blocks of 32
            tokens.
        log_e_value: Logarithm of the e-value after the last value; it does not depend on their
            order.
        log_e_max: Running maximum of that, which decides fraud; it depends on the order.
        log_evidence_honest: Least evidence against any cheat that an honest verdict excludes, as
            the logarithm of a likelihood ratio; it does not depend on the order.
    """

    verdict: Decision
    n: int
    log_e_value: float
    log_e_max: float
    log_evidence_honest: float
