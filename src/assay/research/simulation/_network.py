"""A year of a network under each rule: wrong accusations, time to catch a cheater, and invented nonces paid for.

The nodes with the largest stakes are validators. Every round, every node is checked by a few of them, drawn by
stake. Each recomputes a sample of nonces and votes; a node is convicted when more than half of the stake that checked
it says fraud, and is gone from then on. The rules:

- *published*: the count test of the preset with its published constants;
- *count*: the same count, with the threshold at which honest noise accuses once in a thousand checks;
- *sequential*: the e-value test, begun anew in every check;
- *lifetime*: one e-value for each node, which the residuals of all validators enter; it convicts alone.

Residuals are drawn from the calibrated law, `multiple` times larger or invented for a share of a node's nonces.

Legend of shapes: N nodes, P panels, V validators of a panel, R trials, C checked nonces.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special
from scipy import stats as distributions

from assay import stats
from assay.errors import UsageError
from assay.poc.protocol import RANDOM_HEAD_ROWS, Round
from assay.poc.verdict import COUNT_ALPHA, DIST_THRESHOLD, P_FLIP, P_MISMATCH, Law, sequential_test
from assay.settings import Settings

Rule = Literal["published", "count", "sequential", "lifetime"]
RULES: tuple[Rule, ...] = ("published", "count", "sequential", "lifetime")

ALPHA = 1e-3
R_TARGET = Round.r_target
PANELS = 10_000
TRIALS = 4000
HONEST_TRIALS = 20_000
LIFETIME = 5000  # nonces for which lifetimes are simulated
LIFETIMES = 100
HONEST_LIFETIMES = 20  # times as many of honest nodes, of which one in a thousand may be accused

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Kind:
    """A kind of node.

    Args:
        name: Name in tables.
        multiple: Size of its residuals over that of honest ones.
        junk: Share of its nonces that are invented.
    """

    name: str
    multiple: float = 1.0
    junk: float = 0.0


class Network(Settings):
    """The network and how it checks.

    Raises:
        UsageError: A number is out of range.
    """

    nodes: int = Field(10_000, ge=1, le=10**6, description="Nodes of the network, honest and cheating.")
    cheating: float = Field(0.01, gt=0, lt=0.5, description="Share of the nodes that each kind of cheater has.")
    rounds: int = Field(365, ge=1, le=10**5, description="Rounds in the simulated time.")
    validators: int = Field(100, ge=1, description="Nodes with the largest stakes, who check the others.")
    checkers: int = Field(5, ge=1, description="Different validators that check a node in a round.")
    checked: int = Field(32, ge=1, le=1000, description="Nonces that a validator recomputes.")
    stake_spread: float = Field(1.5, description="Standard deviation of ln stake.")
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn.")

    def model_post_init(self, context: Any, /) -> None:
        """Check numbers against each other."""
        for name, most in (("validators", "nodes"), ("checkers", "validators")):
            if getattr(self, name) > getattr(self, most):
                raise UsageError(
                    f"--{name} {getattr(self, name)}",
                    wanted=f"1 to the {getattr(self, most)} {most}",
                    do=f"lower --{name}",
                )


def simulate_network(network: Network, law: Law, kinds: tuple[Kind, ...]) -> list[dict[str, Any]]:
    """Simulate all rules on one network; return one row per rule and kind, the honest one first.

    Raises:
        UsageError: The cheaters would be more than half of the nodes.
    """
    everyone = (Kind("honest"), *kinds)
    if network.cheating * len(kinds) > 0.5:
        raise UsageError(
            f"{len(kinds)} kinds of cheaters at {network.cheating:.1%} each",
            wanted="at most half of the nodes",
            do="lower --cheating",
        )
    rng = np.random.default_rng(network.seed)
    stake_N = rng.lognormal(0.0, network.stake_spread, network.nodes)
    kind_N = np.zeros(network.nodes, dtype=np.int64)
    each = max(1, int(network.cheating * network.nodes))
    kind_N[: each * len(kinds)] = np.repeat(np.arange(1, len(everyone)), each)
    rng.shuffle(kind_N)
    chances = _Chances(law, network, rng)
    rows = []
    for rule in RULES:
        caught_N = _caught(rule, network, chances, everyone, kind_N, stake_N, rng)
        rows += [
            {"rule": rule, **_row(network, kind, caught_N[kind_N == index], stake_N[kind_N == index])}
            for index, kind in enumerate(everyone)
        ]
    return rows


def _caught(
    rule: Rule,
    network: Network,
    chances: "_Chances",
    kinds: tuple[Kind, ...],
    kind_N: npt.NDArray[np.int64],
    stake_N: FloatArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return the round in which every node is convicted, [N]; infinity for never."""
    if rule == "lifetime":
        return chances.lifetimes(kinds, kind_N)
    chance_N = np.array([chances.accused(rule, kind) for kind in kinds])[kind_N]
    caught_N = np.full(network.nodes, np.inf)
    panels_PV = _panels(network, stake_N, rng)
    for round in range(1, network.rounds + 1):
        here = np.flatnonzero(np.isinf(caught_N) & (chance_N > 0))
        if not here.size:
            break
        weight_NV = panels_PV[rng.integers(len(panels_PV), size=here.size)]
        votes_NV = rng.random(weight_NV.shape) < chance_N[here, None]
        against_N = (weight_NV * votes_NV).sum(axis=1) > weight_NV.sum(axis=1) / 2
        caught_N[here[against_N]] = round
    return caught_N


def _panels(network: Network, stake_N: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Draw panels of checkers and return their stakes, [P, V].

    Without replacement and by stake: the largest of ln stake + Gumbel noise (Yellott 1977).
    """
    stakes = np.sort(stake_N)[-network.validators :]
    keys_PV = np.log(stakes) + rng.gumbel(size=(PANELS, stakes.size))
    return np.asarray(stakes[np.argpartition(keys_PV, -network.checkers, axis=1)[:, -network.checkers :]])


def _row(network: Network, kind: Kind, caught_N: FloatArray, stake_N: FloatArray) -> dict[str, Any]:
    served_N = np.minimum(caught_N - 1, network.rounds)
    found_N = np.sort(caught_N)
    return {
        "kind": kind.name,
        "multiple": kind.multiple,
        "junk": kind.junk,
        "nodes": int(caught_N.size),
        "convicted": int(np.isfinite(caught_N).sum()),
        "convicted_stake": float(stake_N[np.isfinite(caught_N)].sum() / stake_N.sum()),
        "rounds_median": _finite(found_N[found_N.size // 2]),
        "rounds_99": _finite(found_N[int(0.99 * found_N.size)]),
        "paid": float((served_N * stake_N).sum() / (network.rounds * stake_N.sum())),
    }


def _finite(value: float) -> int | None:
    return int(value) if np.isfinite(value) else None


class _Chances:
    """How likely each rule accuses a kind of node, by simulation of its residuals."""

    def __init__(self, law: Law, network: Network, rng: np.random.Generator) -> None:
        self._law, self._network, self._rng = law, network, rng
        self._distance = isinstance(law, stats.ScaleNoise)
        self._test = sequential_test(law, alpha=ALPHA)
        honest_N = self._residuals(Kind("honest"), (HONEST_TRIALS,))
        self._threshold = float(np.quantile(honest_N, 0.95))
        self._honest_rate = self._mismatch_rate(honest_N, self._threshold)

    def accused(self, rule: Rule, kind: Kind) -> float:
        """Chance that one check of a node of this kind votes fraud."""
        checked = self._network.checked
        if rule == "sequential":
            trials = TRIALS if kind.junk or kind.multiple > 1 else HONEST_TRIALS
            return float(self._crossing(kind, trials, checked)[:, -1].mean())
        residuals_N = self._residuals(kind, (HONEST_TRIALS,))
        counts = np.arange(checked + 1)
        if rule == "published":
            p = P_FLIP if self._distance else P_MISMATCH
            accuses = distributions.binom.sf(counts - 1, checked, p) < COUNT_ALPHA
            rate = self._mismatch_rate(residuals_N, DIST_THRESHOLD)
        else:
            accuses = distributions.binom.sf(counts - 1, checked, self._honest_rate) < ALPHA
            rate = self._mismatch_rate(residuals_N, self._threshold)
        critical = int(np.flatnonzero(accuses)[0]) if accuses.any() else checked + 1
        return float(distributions.binom.sf(critical - 1, checked, rate))

    def lifetimes(self, kinds: tuple[Kind, ...], kind_N: npt.NDArray[np.int64]) -> FloatArray:
        """Round in which the e-value of a node's whole life crosses, [N]; infinity for never."""
        caught_N = np.full(kind_N.size, np.inf)
        nonces = self._network.checkers * self._network.checked
        most = min(LIFETIME, nonces * self._network.rounds)
        for index, kind in enumerate(kinds):
            here = np.flatnonzero(kind_N == index)
            first_R = np.concatenate([self._first(kind, most) for _ in range(1 if index else HONEST_LIFETIMES)])
            caught_N[here] = np.ceil(self._rng.choice(first_R, here.size) / nonces)
        return caught_N

    def _first(self, kind: Kind, most: int) -> FloatArray:
        """Return after how many nonces lifetimes of a kind of node end, [R]; infinity for those that do not."""
        crossed_RC = self._crossing(kind, LIFETIMES, most)
        return np.where(crossed_RC[:, -1], crossed_RC.argmax(axis=1) + 1.0, np.inf)

    def _crossing(self, kind: Kind, trials: int, checked: int) -> BoolArray:
        """Whether nodes of a kind have been accused after each of their nonces, [R, C]."""
        return self._test.accusations(self._residuals(kind, (trials, checked)))

    def _residuals(self, kind: Kind, shape: tuple[int, ...]) -> FloatArray:
        """Sizes of residuals of a kind of node: noise, or junk in a share of the nonces."""
        noise = kind.multiple * self._noise(shape)
        if not kind.junk:
            return noise
        return np.where(self._rng.random(shape) < kind.junk, self._invented(shape), noise)

    def _noise(self, shape: tuple[int, ...]) -> FloatArray:
        if isinstance(self._law, stats.ScaleNoise):
            return np.abs(self._law.sigma * self._rng.standard_t(self._law.dof, shape))
        return np.exp(self._law.mu + self._law.sd * self._standard(self._law, shape))

    def _standard(self, law: stats.LogNoise, shape: tuple[int, ...]) -> FloatArray:
        """Draw the standardised law: normal within ``tail``, exponential beyond."""
        beyond = 2 * np.exp(-(law.tail**2) / 2) / law.tail / law.standard_mass
        edge = distributions.norm.sf(law.tail)
        core = special.ndtri(self._rng.uniform(edge, 1 - edge, shape))
        outer = (law.tail + self._rng.exponential(1 / law.tail, shape)) * self._rng.choice([-1.0, 1.0], shape)
        return np.where(self._rng.random(shape) < beyond, outer, core)

    def _invented(self, shape: tuple[int, ...]) -> FloatArray:
        if isinstance(self._law, stats.ScaleNoise):
            return np.abs(self._rng.normal(0.0, self._law.junk_sigma, shape))
        d = self._law.dimension
        return 2 * np.sqrt(self._rng.beta((d - 1) / 2, (d - 1) / 2, shape))

    def _mismatch_rate(self, sizes_N: FloatArray, threshold: float) -> float:
        """Chance of a mismatch: a vector beyond the threshold, or a valid distance that turns invalid."""
        if not self._distance:
            return float(np.mean(sizes_N > threshold))
        valid = stats.valid_rate(R_TARGET, RANDOM_HEAD_ROWS)
        crossed_N = stats.chord_cdf(R_TARGET + sizes_N, RANDOM_HEAD_ROWS) - valid
        return float(np.mean(crossed_N)) / valid / 2  # half of the residuals have the sign that flips
