"""The network, what is simulated of it, and the rules that vote in every check.

The nodes with the largest stakes are validators. Every round, every node is checked by a few of them, drawn by
stake. Each recomputes a sample of nonces and votes; a node is convicted when more than half of the stake that checked
it says fraud, and is gone from then on. The rules:

- *published*: the count test of the preset with its published constants;
- *count*: the same count, with the threshold at which honest noise accuses once in a thousand checks;
- *sequential*: the e-value test, begun anew in every check;
- *lifetime*: one account for each node, which the residuals of all validators enter; it convicts alone.

Nodes are judged by one of two kinds of laws. Under the *default* law of the preset and dtype, honest nodes have that
law itself, which is wider than what was measured. Under a *predictive* law, which is what was measured with the spread
of machines that were not, every honest node has a scale of its own for its life, and every block another one. Cheaters
have what the red team measured for an attack, or junk in a share of their nonces.

Legend of shapes: N nodes, P panels or paths of the e-value, V validators of a panel, R trials, C checked nonces, A
sizes of a grid.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special

from assay import stats
from assay.errors import UsageError
from assay.files.jsonl import JsonObject
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.verdict.calibration import PAIR_SPREAD, PRIOR, SCALED_SPREAD
from assay.poc.verdict.life import EPOCH, error_share
from assay.poc.verdict.noise import Noise, bundled_noise, sequential_test
from assay.settings import Names, Settings
from assay.stats.noise import Spread
from assay_research.redteam.field import PRESETS, Judge, count_power
from assay_research.runs.report import Column, Curves, Section, Table, or_never, table_of
from assay_research.runs.runs import Measurement, Plan, RunRecords

QWEN3 = "4fe788470005f674c3b7a43790593d0a873a83b6fbabad16e403361d09a5b6fb"
MARGIN = 2.0
"""Factor of the law that comes with assay over the noise that was measured on the bundled models."""

RULES = ("published", "count", "sequential", "lifetime")
LAWS = ("default", "predictive")

ALPHA = 1e-3
PANELS = 10_000
TRIALS = 4000
HONEST_TRIALS = 20_000

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


# The whole lives of many nodes, nonce by nonce: when :class:`assay.poc.verdict.Life` suspects them. A conviction must
# also stand without any one block and without faulty places.
# A life is too long to take logarithms of densities at every nonce of a hundred thousand nodes. So the sizes of
# residuals are drawn from a fine grid, and what each size of it multiplies every path of the e-value by is looked up.
# The steps are those of :class:`assay.stats.SequentialTest`, the shares and lengths of the tests those of ``Life``.


SIZES = 2048  # neighbours lie less than 1 % apart
SMALLEST = 1e-3  # of a typical residual: what is smaller says the same
LARGEST = 2.0
TOGETHER = 512  # nodes of one task
SEGMENT = 64  # nonces after which the paths are divided by the honest ones


@dataclass(frozen=True)
class Kind:
    """A kind of node.

    Args:
        name: Name in tables.
        multiple: Size of the residuals that it computes cheaply over that of honest ones.
        junk: Share of its nonces that are invented.
        share: Share of the other nonces that are computed cheaply.
        honest_for: Share of the rounds that it is honest for at first.
    """

    name: str
    multiple: float = 1.0
    junk: float = 0.0
    share: float = 1.0
    honest_for: float = 0.0

    @property
    def honest(self) -> bool:
        """Whether it does not cheat at all."""
        return self.multiple == 1 and self.junk == 0


@dataclass(frozen=True)
class Machines:
    """How the noise of honest machines differs from the law.

    Args:
        spread: Law of the scale of a machine, which is drawn once for its life.
        block: Standard deviation of ln of the scale of a block, which is drawn for every node and round.
    """

    spread: Spread = field(default_factory=Spread)
    block: float = 0.0


class Grid:
    """Sizes of residuals, equally far apart in their logarithms, and the laws of honest and invented ones on them.

    Args:
        law: Law of honest residuals.
    """

    def __init__(self, law: stats.NoiseLaw) -> None:
        log_A = np.linspace(math.log(law.size * SMALLEST), math.log(LARGEST), SIZES)
        self.sizes_A = np.exp(log_A)
        self.step = float(log_A[1] - log_A[0])
        edges = np.exp(log_A[:-1] + self.step / 2)
        self._honest_A, self._junk_A = 1 - law.survival(edges), _invented(law, edges)

    def shifts(self, log_scale_N: FloatArray, rng: np.random.Generator) -> IntArray:
        """Return numbers of places on the grid, rounded at random so that their mean is right."""
        return np.floor(log_scale_N / self.step + rng.random(log_scale_N.shape)).astype(np.int64)

    def draw(self, kind: Kind, log_scale_N: FloatArray, nonces: int, rng: np.random.Generator) -> IntArray:
        """Draw the residuals of a round as places on the grid, [N, C].

        Args:
            kind: What the nodes do in this round.
            log_scale_N: Logarithm of the scale of every node's honest noise over that of the law.
            nonces: Number of nonces.
            rng: Generator of everything that is drawn.
        """
        shape = log_scale_N.size, nonces
        honest_N, cheap_N = (self.shifts(log_scale_N + math.log(size), rng) for size in (1.0, kind.multiple))
        places_NC = np.searchsorted(self._honest_A, rng.random(shape))
        chance_NC = rng.random(shape)
        cheap_NC = chance_NC < kind.junk + (1 - kind.junk) * kind.share
        places_NC += np.where(cheap_NC, cheap_N[:, None], honest_N[:, None])
        if kind.junk:
            junk_NC = np.searchsorted(self._junk_A, rng.random(shape))
            places_NC = np.where(chance_NC < kind.junk, junk_NC, places_NC)
        return np.clip(places_NC, 0, SIZES - 1)


class ManyLives:
    """The running tests of many nodes that are all judged alike: as :class:`assay.poc.verdict.Life`, for each of them.

    Args:
        noise: Honest noise that is judged by.
        sizes_A: Sizes of the residuals; what each does to every path of the e-value is looked up.
        nodes: Number of nodes.
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
    """

    def __init__(self, noise: Noise, sizes_A: FloatArray, *, nodes: int, alpha: float) -> None:
        test = sequential_test(noise)
        self._alpha, self._honest = alpha, test.honest_paths
        paths = slice(0, test.prior.size - test.excluding)  # those that an honest verdict excludes convict nobody
        self._prior_P, self._factor_AP = np.exp(test.prior[paths]), np.exp(test.steps(sizes_A)[:, paths])
        self._shape = nodes, self._prior_P.size
        self._tests = [self._begin(1)]
        self._since = 0
        self.convicted_N = np.zeros(nodes, dtype=np.bool_)

    def _begin(self, number: int) -> tuple[int, FloatArray]:
        self._number = number
        return number, np.broadcast_to(self._prior_P, self._shape).copy()

    def update(self, places_NC: IntArray) -> npt.NDArray[np.bool_]:
        """Take the residuals of one audit, as places on the grid; return who is convicted by now, [N]."""
        if self._since >= EPOCH:
            self._tests[1:], self._since = [self._begin(self._number + 1)], 0
        honest, nonces = self._honest, places_NC.shape[1]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # infinite evidence convicts
            for number, path_NP in self._tests:
                bound = 1 / (self._alpha * error_share(number))
                for place, places_N in enumerate(places_NC.T, start=1):
                    path_NP *= self._factor_AP[places_N]
                    for_honest_N = path_NP[:, :honest].sum(axis=1)
                    self.convicted_N |= ~(path_NP[:, honest:].sum(axis=1) < bound * for_honest_N)
                    if place % SEGMENT == 0 or place == nonces:
                        path_NP /= for_honest_N[:, None]
        self._since += nonces
        return self.convicted_N


def convicted_in(
    kind: Kind,
    noise: Noise,
    machines: Machines,
    *,
    nodes: int,
    rounds: int,
    nonces: int,
    alpha: float,
    seed: tuple[int, ...],
) -> FloatArray:
    """Return the round in which each of many nodes of a kind is convicted, [N]; infinity for never.

    Args:
        kind: Kind of all the nodes.
        noise: Honest noise that they are judged under.
        machines: How machines differ from it.
        nodes: Number of nodes.
        rounds: Number of rounds of their lives.
        nonces: Number of nonces that are checked in a round; each round is one audit.
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        seed: Seed of everything that is drawn.
    """
    grid = Grid(noise.law)

    def live(start: int) -> FloatArray:
        rng = np.random.default_rng((*seed, start))
        count = min(TOGETHER, nodes - start)
        lives = ManyLives(noise, grid.sizes_A, nodes=count, alpha=alpha)
        log_scale_N = machines.spread.sd * rng.standard_t(machines.spread.dof, count)
        caught_N = np.full(count, np.inf)
        for round in range(1, rounds + 1):
            cheats = kind if round > kind.honest_for * rounds else Kind("honest")
            here_N = log_scale_N + machines.block * rng.standard_normal(count)
            before_N = lives.convicted_N.copy()
            lives.update(grid.draw(cheats, here_N, nonces, rng))
            caught_N[lives.convicted_N & ~before_N] = round
            if lives.convicted_N.all():
                break
        return caught_N

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.concatenate(list(pool.map(live, range(0, nodes, TOGETHER))))


def _invented(law: stats.NoiseLaw, sizes_A: FloatArray) -> FloatArray:
    """Return the chance that an invented value misses by less."""
    if isinstance(law, stats.ScaleNoise):
        return np.asarray(special.erf(sizes_A / law.junk_sigma / math.sqrt(2)), dtype=np.float64)
    return np.asarray(stats.chord_cdf(sizes_A, law.dimension), dtype=np.float64)


# The network.

JUNK = tuple(Kind(f"{share:.1%} junk", junk=share) for share in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1))
PARTIAL = (
    Kind("10% of the nonces cheap", multiple=22.0, share=0.1),
    Kind("20% of the nonces cheap", multiple=10.0, share=0.2),
)
LATE = 0.5
"""Share of the rounds for which a node is honest that then computes with weights of four bits."""

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
    machine_spread: float = Field(
        PRIOR.sd, ge=0, le=0.5, description="Spread of ln scale of honest machines, under predictive laws."
    )
    validators: int = Field(100, ge=1, description="Nodes with the largest stakes, who check the others.")
    checkers: int = Field(5, ge=1, description="Different validators that check a node in a round.")
    checked: int = Field(32, ge=1, le=1000, description="Nonces that a validator recomputes.")
    stake_spread: float = Field(1.5, ge=0, le=10, description="Standard deviation of ln stake.")
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


class SimulationPlan(Plan):
    """What is simulated: provers of some dtypes against validators that compute in float32.

    Raises:
        UsageError: A preset, dtype or law is unknown or named twice, or a list is empty.
    """

    presets: Names = Field(PRESETS, description="Presets of the rounds, separated by commas.")
    dtypes: Names = Field(tuple(KINDS), description="Dtypes of provers, separated by commas; validators have float32.")
    laws: Names = Field(LAWS, description="Laws that nodes are judged by, separated by commas: default, predictive.")
    network: Network = Field(Network(), description="Nodes, validators and rounds.")

    experiment = "simulate"
    known: ClassVar[Mapping[str, Sequence[str]]] = {"presets": PRESETS, "dtypes": tuple(KINDS), "laws": LAWS}

    def noise(self, preset: str, dtype: str, law: str) -> Noise:
        """Return the noise that validators judge by."""
        default = bundled_noise(QWEN3, get_pipeline(preset).noise, dtype, "float32")
        assert default is not None
        if law == "default":
            return default
        measured = default.scaled(1 / MARGIN)
        machines = self.machines(preset, law)
        spread = Spread(math.hypot(machines.spread.sd, machines.block), machines.spread.dof)
        return Noise(measured.law, "what was measured, for machines that were not", spread)

    def machines(self, preset: str, law: str) -> Machines:
        """Return how the noise of honest machines differs from the law."""
        if law == "default":
            return Machines()
        block = SCALED_SPREAD if get_pipeline(preset).output == "distance" else PAIR_SPREAD
        return Machines(Spread(self.network.machine_spread, PRIOR.dof), block)

    def kinds(self, preset: str, dtype: str, law: str) -> tuple[Kind, ...]:
        """Return the attackers. Theirs are multiples of measured noise, over which a default law has a margin."""
        margin = MARGIN if law == "default" else 1.0
        found = KINDS[dtype][preset]
        late = replace(found[0], name=f"{found[0].name}, late", honest_for=LATE)
        cheap = [replace(kind, multiple=kind.multiple / margin) for kind in (*found, *PARTIAL, late)]
        return *cheap, *JUNK

    @property
    def settings(self) -> JsonObject:
        """What must be the same for all cells of a run: the network."""
        return self.network.model_dump()

    def cells(self) -> Iterator[Measurement]:
        """Return every law, dtype and preset."""
        for law, dtype, preset in product(self.laws, self.dtypes, self.presets):
            yield f"{preset}/{dtype}/{law}", partial(_simulate, self, preset, dtype, law)


def _simulate(plan: SimulationPlan, preset: str, dtype: str, law: str) -> JsonObject:
    started = time.perf_counter()
    noise, kinds = plan.noise(preset, dtype, law), plan.kinds(preset, dtype, law)
    rules = RULES if law == "default" else ("lifetime",)
    rows = simulate_network(plan.network, noise, kinds, machines=plan.machines(preset, law), rules=rules)
    seconds = round(time.perf_counter() - started, 1)
    return {"preset": preset, "dtype": dtype, "law": law, "seconds": seconds, "rows": rows}


def simulate_network(
    network: Network,
    noise: Noise,
    kinds: tuple[Kind, ...],
    *,
    machines: Machines | None = None,
    rules: Sequence[str] = RULES,
) -> list[dict[str, Any]]:
    """Simulate rules on one network; return one row per rule and kind, the honest one first.

    Args:
        network: Network and how it checks.
        noise: Honest noise that validators judge by.
        kinds: Kinds of cheaters.
        machines: How the noise of honest machines differs from the law; not at all when None. Rules other than
            *lifetime* are simulated without it.
        rules: Rules to simulate.

    Raises:
        UsageError: The cheaters would be more than half of the nodes.
    """
    everyone = (Kind("honest"), *kinds)
    each = max(1, int(network.cheating * network.nodes))
    if each * len(kinds) > network.nodes / 2:
        raise UsageError(
            f"{each} cheaters of each of {len(kinds)} kinds among {network.nodes} nodes",
            wanted="at most half of the nodes",
            do="lower --cheating, or raise --nodes",
        )
    rng = np.random.default_rng(network.seed)
    stake_N = rng.lognormal(0.0, network.stake_spread, network.nodes)
    kind_N = np.zeros(network.nodes, dtype=np.int64)
    kind_N[: each * len(kinds)] = np.repeat(np.arange(1, len(everyone)), each)
    rng.shuffle(kind_N)
    rows = []
    for rule in rules:
        if rule == "lifetime":
            caught_N = _lifetimes(network, noise, machines or Machines(), everyone, kind_N)
        else:
            chances = [_chance(rule, network, noise, kind, rng) for kind in everyone]
            caught_N = _caught(network, np.array(chances), everyone, kind_N, stake_N, rng)
        rows += [
            {"rule": rule, **_row(network, kind, caught_N[kind_N == index], stake_N[kind_N == index])}
            for index, kind in enumerate(everyone)
        ]
    return rows


def _lifetimes(
    network: Network, noise: Noise, machines: Machines, kinds: tuple[Kind, ...], kind_N: npt.NDArray[np.int64]
) -> FloatArray:
    """Return the round in which the account of every node convicts it, [N]; infinity for never."""
    caught_N = np.full(network.nodes, np.inf)
    for index, kind in enumerate(kinds):
        here_N = kind_N == index
        caught_N[here_N] = convicted_in(
            kind,
            noise,
            machines,
            nodes=int(here_N.sum()),
            rounds=network.rounds,
            nonces=network.checkers * network.checked,
            alpha=ALPHA,
            seed=(network.seed, index),
        )
    return caught_N


def _caught(
    network: Network,
    chance_K: FloatArray,
    kinds: tuple[Kind, ...],
    kind_N: npt.NDArray[np.int64],
    stake_N: FloatArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return the round in which every node is convicted, [N]; infinity for never."""
    begins_K = np.array([kind.honest_for for kind in kinds]) * network.rounds
    caught_N = np.full(network.nodes, np.inf)
    panels_PV = _panels(network, stake_N, rng)
    for round in range(1, network.rounds + 1):
        chance_N = np.where(round > begins_K, chance_K, chance_K[0])[kind_N]
        here = np.flatnonzero(np.isinf(caught_N) & (chance_N > 0))
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
    median, most = found_N[found_N.size // 2], found_N[math.ceil(0.99 * found_N.size) - 1]
    return {
        "kind": kind.name,
        "multiple": kind.multiple,
        "junk": kind.junk,
        "share": kind.share,
        "honest_for": kind.honest_for,
        "nodes": int(caught_N.size),
        "convicted": int(np.isfinite(caught_N).sum()),
        "convicted_interval": list(stats.proportion_interval(int(np.isfinite(caught_N).sum()), caught_N.size)),
        "convicted_stake": float(stake_N[np.isfinite(caught_N)].sum() / stake_N.sum()),
        "rounds_median": int(median) if np.isfinite(median) else None,
        "rounds_99": int(most) if np.isfinite(most) else None,
        "paid": float((served_N * stake_N).sum() / (network.rounds * stake_N.sum())),
    }


def _chance(rule: str, network: Network, noise: Noise, kind: Kind, rng: np.random.Generator) -> float:
    """Return the chance that one check of a node of a kind votes fraud."""
    pipeline = get_pipeline("poc-2.0" if isinstance(noise.law, stats.ScaleNoise) else "hardened")
    honest_RC = draw_residuals(noise, Kind("honest"), HONEST_TRIALS, 1, rng)
    judge = Judge(pipeline, honest_RC.ravel(), noise)
    drawn_RC = draw_residuals(noise, kind, HONEST_TRIALS if kind.honest else TRIALS, network.checked, rng)
    if rule == "sequential":
        return judge.accused(drawn_RC)
    if rule == "published":
        return judge.published(drawn_RC)
    return count_power(network.checked, judge.honest_rate, judge.mismatch_rate(drawn_RC.ravel()))


def draw_residuals(noise: Noise, kind: Kind, audits: int, checked: int, rng: np.random.Generator) -> FloatArray:
    """Return the residuals of audits of a kind of node while it cheats, [R, C]; those of distances have a sign."""
    grid = Grid(noise.law)
    sizes_RC = grid.sizes_A[grid.draw(kind, np.zeros(audits), checked, rng)]
    signed = isinstance(noise.law, stats.ScaleNoise)
    return sizes_RC * rng.choice((-1.0, 1.0), sizes_RC.shape) if signed else sizes_RC


# What the simulated year shows.


def section(run: RunRecords) -> Section:
    """Return what every rule does to every kind of node."""
    settings = run.settings
    about = (
        f"Every round {settings['checkers']} of {settings['validators']} validators, drawn by stake, recompute "
        f"{settings['checked']} nonces of every node. 'Reward paid' is the share of the year's reward that nodes of a "
        "kind drew before they were convicted. Honest nodes should be paid all of it. Under a predictive law every "
        "honest node has a scale of noise of its own, which the law does not know."
    )
    tables = {"Honest nodes convicted in their whole life": honest_table(run.cells)}
    tables |= {cell_name(cell): year_table(cell) for cell in run.cells}
    heading = f"A network of {settings['nodes']} nodes over {settings['rounds']} rounds"
    return Section(heading, about, tables, [_curves(cell) for cell in run.cells], {"presets": run.cells})


def _curves(cell: JsonObject) -> Curves:
    lines = {}
    for rule in dict.fromkeys(row["rule"] for row in cell["rows"]):
        rows = [row for row in cell["rows"] if row["rule"] == rule and row["junk"]]
        lines[rule] = ([100 * row["junk"] for row in rows], [100 * row["paid"] for row in rows])
    x, y = "share of a node's nonces that is invented, %", "share of the year's reward paid, %"
    return Curves(f"{cell_name(cell)}: reward paid to nodes that invent a share of their nonces.", x, y, lines)


def cell_name(cell: JsonObject) -> str:
    """Return what a cell is called in captions."""
    return f"{cell['preset']}, {cell['dtype']}, {_law(cell)} law"


def _law(cell: JsonObject) -> str:
    return str(cell.get("law", "default"))  # runs of the first version knew no other


def honest_table(cells: Sequence[JsonObject]) -> Table:
    """Return how many honest nodes their own account convicts, by law, dtype and preset."""
    rows = []
    for cell in cells:
        honest = next(row for row in cell["rows"] if row["rule"] == "lifetime" and row["kind"] == "honest")
        low, high = stats.proportion_interval(honest["convicted"], honest["nodes"])
        rows.append({**cell, **honest, "law": _law(cell), "low": low, "high": high})
    columns = {"law": "law", "format": "dtype", "preset": "preset", "honest nodes convicted": "{convicted} of {nodes}"}
    return table_of(rows, columns | {"share, 95 % interval": "{low:.2e} to {high:.2e}"})


def year_table(cell: JsonObject) -> Table:
    """Return what every rule does to every kind of node, for one preset, dtype and law."""
    columns: dict[str, Column] = {
        "rule": "rule",
        "kind of node": "kind",
        "convicted": "{convicted} of {nodes}",
        "median round": or_never("rounds_median"),
        "99 % convicted by round": or_never("rounds_99"),
        "reward paid": "{paid:.2%}",
    }
    return table_of(cell["rows"], columns)
