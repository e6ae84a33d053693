"""A year of a network under each verdict rule: false accusations, time to catch a cheater, and junk that is paid for.

The nodes with the largest stakes are validators. Every round, every node is checked by a few of them, drawn by
stake. Each recomputes a sample of nonces and votes; a node is convicted when more than half of the stake that checked
it says fraud, and is gone from then on. The rules:

- *published*: the count test of the preset with its published constants;
- *count*: the same count, with the threshold at which honest noise accuses once in a thousand checks;
- *sequential*: the e-value test, begun anew in every check;
- *lifetime*: one e-value for each node, which the residuals of all validators enter; it convicts alone.

Residuals are drawn from the stated law of the preset and dtype, multiplied by what the red team measured for an attack
or replaced by junk in a share of a node's nonces.

Legend of shapes: N nodes, P panels, V validators of a panel, R trials, C checked nonces.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special
from scipy import stats as distributions

from assay import stats
from assay.errors import UsageError
from assay.poc.protocol import RANDOM_HEAD_ROWS, Round, get_pipeline
from assay.poc.verdict import (
    COUNT_ALPHA,
    DIST_THRESHOLD,
    MARGIN,
    P_FLIP,
    P_MISMATCH,
    Law,
    Noise,
    default_noise,
    sequential_test,
)
from assay.reports import SERIES, Cell, JsonObject, Report, figure, legend
from assay.research.redteam import PRESETS, count_power
from assay.research.runs import Progress, RunRecords, Table, measure_missing
from assay.settings import Names, Settings

__all__ = ["Kind", "Network", "SimulationPlan", "draw", "run_simulation", "simulate_network", "year_table"]

Rule = Literal["published", "count", "sequential", "lifetime"]
RULES: tuple[Rule, ...] = get_args(Rule)

ALPHA = 1e-3
PANELS = 10_000
TRIALS = 4000
HONEST_TRIALS = 20_000
LIFETIME = 5000  # nonces for which lifetimes are simulated
LIFETIMES = 100
HONEST_LIFETIMES = 20  # times as many of honest nodes, of which one in a thousand may be accused

FloatArray = npt.NDArray[np.float64]


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


JUNK = tuple(Kind(f"{share:.1%} junk", junk=share) for share in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1))

KINDS: dict[str, dict[str, tuple[Kind, ...]]] = {
    "bfloat16": {
        "poc-2.0": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("half of the positions", 7.0)),
        "artifact": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("half of the positions", 7.0)),
        "hardened": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("three quarters of the work", 14.0)),
    },
    "float16": {
        "poc-2.0": (Kind("int4 weights", 154.0), Kind("int8 weights", 9.7), Kind("half of the positions", 44.0)),
        "artifact": (Kind("int4 weights", 154.0), Kind("int8 weights", 9.7), Kind("half of the positions", 44.0)),
        "hardened": (Kind("int4 weights", 140.0), Kind("int8 weights", 9.1), Kind("three quarters of the work", 112.0)),
    },
}
"""Attackers by number format and preset: residuals over the honest ones, of the bundled models (docs/redteam.md)."""


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


class SimulationPlan(Settings):
    """What is simulated. The honest law is the stated default of a prover's dtype against float32.

    Raises:
        UsageError: A preset or dtype is unknown or named twice, or a list is empty.
    """

    presets: Names = Field(PRESETS, description="Presets of the rounds, separated by commas.")
    dtypes: Names = Field(tuple(KINDS), description="Dtypes of provers, separated by commas; validators have float32.")
    network: Network = Field(Network(), description="Nodes, validators and rounds.")

    def model_post_init(self, context: Any, /) -> None:
        """Check the names."""
        for name, given, known in (("presets", self.presets, PRESETS), ("dtypes", self.dtypes, tuple(KINDS))):
            odd = [value for value in given if value not in known or given.count(value) > 1]
            if odd or not given:
                raise UsageError(
                    f"{name} {', '.join(odd) or 'none'}",
                    wanted="some of " + ", ".join(known) + ", each once",
                    do=f"correct --{name}",
                )

    def law(self, preset: str, dtype: str) -> Law:
        """Return the honest law that nodes follow and validators assume."""
        return default_noise(get_pipeline(preset).noise, dtype, "float32").law

    def kinds(self, preset: str, dtype: str) -> tuple[Kind, ...]:
        """Return the attackers. Theirs are multiples of measured noise, and the law has its margin over that."""
        return *(replace(kind, multiple=kind.multiple / MARGIN) for kind in KINDS[dtype][preset]), *JUNK


def run_simulation(plan: SimulationPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Simulate the presets and dtypes that a run's folder does not hold yet.

    Raises:
        UsageError: The folder holds a run of another network.
        StorageError: The file cannot be written.
    """
    pairs = product(plan.dtypes, plan.presets)
    cells = [(f"{preset}/{dtype}", partial(_simulate, plan, preset, dtype)) for dtype, preset in pairs]
    measure_missing(folder, "simulate", plan.network.model_dump(), cells, progress)


def _simulate(plan: SimulationPlan, preset: str, dtype: str) -> JsonObject:
    started = time.perf_counter()
    rows = simulate_network(plan.network, plan.law(preset, dtype), plan.kinds(preset, dtype))
    return {"preset": preset, "dtype": dtype, "seconds": round(time.perf_counter() - started, 1), "rows": rows}


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
    median, most = found_N[found_N.size // 2], found_N[int(0.99 * found_N.size)]
    return {
        "kind": kind.name,
        "multiple": kind.multiple,
        "junk": kind.junk,
        "nodes": int(caught_N.size),
        "convicted": int(np.isfinite(caught_N).sum()),
        "convicted_stake": float(stake_N[np.isfinite(caught_N)].sum() / stake_N.sum()),
        "rounds_median": int(median) if np.isfinite(median) else None,
        "rounds_99": int(most) if np.isfinite(most) else None,
        "paid": float((served_N * stake_N).sum() / (network.rounds * stake_N.sum())),
    }


class _Chances:
    """How likely each rule accuses a kind of node, by simulation of its residuals."""

    def __init__(self, law: Law, network: Network, rng: np.random.Generator) -> None:
        self._law, self._network, self._rng = law, network, rng
        self._distance = isinstance(law, stats.ScaleNoise)
        self._test = sequential_test(Noise(law, "the stated default"), alpha=ALPHA)
        honest_N = self._residuals(Kind("honest"), (HONEST_TRIALS,))
        self._threshold = float(np.quantile(honest_N, 0.95))
        self._honest_rate = self._mismatch_rate(honest_N, self._threshold)

    def accused(self, rule: Rule, kind: Kind) -> float:
        """Return the chance that one check of a node of this kind votes fraud."""
        checked = self._network.checked
        if rule == "sequential":
            trials = TRIALS if kind.junk or kind.multiple > 1 else HONEST_TRIALS
            return float(self._accusations(kind, trials, checked)[:, -1].mean())
        residuals_N = self._residuals(kind, (HONEST_TRIALS,))
        if rule == "published":
            granted = P_FLIP if self._distance else P_MISMATCH
            return count_power(checked, granted, self._mismatch_rate(residuals_N, DIST_THRESHOLD), COUNT_ALPHA)
        return count_power(checked, self._honest_rate, self._mismatch_rate(residuals_N, self._threshold))

    def lifetimes(self, kinds: tuple[Kind, ...], kind_N: npt.NDArray[np.int64]) -> FloatArray:
        """Return the round in which the e-value of a node's whole life crosses, [N]; infinity for never."""
        caught_N = np.full(kind_N.size, np.inf)
        nonces = self._network.checkers * self._network.checked
        most = min(LIFETIME, nonces * self._network.rounds)
        for index, kind in enumerate(kinds):
            here = np.flatnonzero(kind_N == index)
            drawn = [self._accusations(kind, LIFETIMES, most) for _ in range(1 if index else HONEST_LIFETIMES)]
            crossed_RC = np.concatenate(drawn)
            first_R = np.where(crossed_RC[:, -1], crossed_RC.argmax(axis=1) + 1.0, np.inf)
            caught_N[here] = np.ceil(self._rng.choice(first_R, here.size) / nonces)
        return caught_N

    def _accusations(self, kind: Kind, trials: int, checked: int) -> npt.NDArray[np.bool_]:
        """Return whether nodes of a kind have been accused after each of their nonces, [R, C]."""
        return self._test.accusations(self._residuals(kind, (trials, checked)))

    def _residuals(self, kind: Kind, shape: tuple[int, ...]) -> FloatArray:
        """Return sizes of residuals of a kind of node: noise, or junk in a share of the nonces."""
        noise = kind.multiple * self._noise(shape)
        if not kind.junk:
            return noise
        return np.where(self._rng.random(shape) < kind.junk, self._invented(shape), noise)

    def _noise(self, shape: tuple[int, ...]) -> FloatArray:
        """Draw from the law; the standardised logarithm is normal within ``tail`` and exponential beyond."""
        law, rng = self._law, self._rng
        if isinstance(law, stats.ScaleNoise):
            return np.abs(law.sigma * rng.standard_t(law.dof, shape))
        beyond = 2 * np.exp(-(law.tail**2) / 2) / law.tail / law.standard_mass
        edge = distributions.norm.sf(law.tail)
        core = special.ndtri(rng.uniform(edge, 1 - edge, shape))
        outer = (law.tail + rng.exponential(1 / law.tail, shape)) * rng.choice([-1.0, 1.0], shape)
        return np.exp(law.mu + law.sd * np.where(rng.random(shape) < beyond, outer, core))

    def _invented(self, shape: tuple[int, ...]) -> FloatArray:
        if isinstance(self._law, stats.ScaleNoise):
            return np.abs(self._rng.normal(0.0, self._law.junk_sigma, shape))
        half = (self._law.dimension - 1) / 2
        return 2 * np.sqrt(self._rng.beta(half, half, shape))

    def _mismatch_rate(self, sizes_N: FloatArray, threshold: float) -> float:
        """Return the chance of a mismatch: a vector beyond the threshold, or a valid distance that turns invalid."""
        if not self._distance:
            return float(np.mean(sizes_N > threshold))
        valid = stats.valid_rate(Round.r_target, RANDOM_HEAD_ROWS)
        crossed_N = stats.chord_cdf(Round.r_target + sizes_N, RANDOM_HEAD_ROWS) - valid
        return float(np.mean(crossed_N)) / valid / 2  # half of the residuals have the sign that flips


_SHOWN = 1e-4  # least share on the logarithmic axis


def draw(report: Report, run: RunRecords) -> None:
    """Add a table and a plot of what every rule does to every kind of node."""
    settings = run.settings
    report.section(f"A network of {settings['nodes']} nodes over {settings['rounds']} rounds")
    report.paragraph(
        f"Every round {settings['checkers']} of {settings['validators']} validators, drawn by stake, recompute "
        f"{settings['checked']} nonces of every node. 'Reward paid' is the share of the year's reward that nodes of a "
        "kind drew before they were convicted. Honest nodes should be paid all of it."
    )
    for cell in run.cells:
        name = f"{cell['preset']}, {cell['dtype']}"
        _plot(report, name, cell)
        report.table(*year_table(cell), caption=name)


def year_table(cell: JsonObject) -> Table:
    """Return what every rule does to every kind of node, for one preset and dtype."""
    rows: list[list[Cell]] = []
    for row in cell["rows"]:
        cells: list[Cell] = [
            row["rule"],
            row["kind"],
            f"{row['convicted']} of {row['nodes']}",
            "never" if row["rounds_median"] is None else row["rounds_median"],
            "never" if row["rounds_99"] is None else row["rounds_99"],
            f"{row['paid']:.2%}",
        ]
        rows.append(cells)
    return ("rule", "kind of node", "convicted", "median round", "99 % convicted by round", "reward paid"), rows


def _plot(report: Report, name: str, cell: JsonObject) -> None:
    fig, ax = figure()
    rules = list(dict.fromkeys(row["rule"] for row in cell["rows"]))
    for color, rule in zip(SERIES, rules, strict=False):
        rows = [row for row in cell["rows"] if row["rule"] == rule and row["junk"]]
        shares = [100 * row["junk"] for row in rows]
        ax.plot(shares, [100 * max(row["paid"], _SHOWN) for row in rows], "o-", color=color, label=rule)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("share of a node's nonces that is invented, %")
    ax.set_ylabel("share of the year's reward paid, %")
    legend(ax)
    report.figure(fig, f"{name}: reward paid to nodes that invent a share of their nonces, by verdict rule.")
