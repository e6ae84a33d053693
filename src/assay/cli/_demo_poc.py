"""The Proof of Compute half of the demonstration: honest nodes, four cheaters, one validator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from assay.models import Model
    from assay.poc import Proof, Verdict
    from assay.reports import BadgeKind, Cell, Report

Progress = Callable[[int, int], None]

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
KEYS = ("node_A", "node_B", "node_C")
SEQ_LEN = 16  # a sixteenth of the default: a demonstration should be over before coffee
NONCES = 64
SAMPLE = 32
COLUMNS = ("node", "mean distance", "valid", "largest residual", "checked", "verdict")


@dataclass(frozen=True)
class Case:
    """One proof and what the validator said of it."""

    name: str
    proof: "Proof"
    verdict: "Verdict"


def run_honest(model: "Model", progress: Progress | None) -> list[Case]:
    """Prove and verify one round per block and key."""
    from assay import poc

    rounds = [
        poc.Round(block_hash=block, public_key=key, seq_len=SEQ_LEN, model=model.reference)
        for block in BLOCKS
        for key in KEYS
    ]
    cases = []
    for index, round in enumerate(rounds):
        proof = poc.prove(model, round, round.nonces(0, NONCES))
        verdict = poc.verify(proof, model, sample=SAMPLE)
        cases.append(Case(f"{round.block_hash} {round.public_key}", proof, verdict))
        if progress:
            progress((index + 1) * NONCES, len(rounds) * NONCES)
    return cases


def run_cheaters(model: "Model", honest: Sequence[Case], progress: Progress | None) -> list[Case]:
    """Let four cheaters claim the first honest round; the validator has the real model."""
    from assay import poc
    from assay.research import cheats

    claimed = honest[0].proof
    round, nonces = claimed.round, range(NONCES)
    skipped = max(1, model.num_layers // 4)
    attempts: list[tuple[str, Callable[[], Proof]]] = [
        ("weights rounded to int4", lambda: poc.prove(cheats.rounded(model), round, nonces)),
        (
            f"last {skipped} layers skipped",
            lambda: poc.prove(cheats.without_last_layers(model, skipped), round, nonces),
        ),
        ("distances invented", lambda: cheats.invented(claimed)),
        ("another node's proof", lambda: cheats.replayed(honest[1].proof, replace(round, model=""))),
    ]
    cases = []
    for index, (name, attempt) in enumerate(attempts):
        proof = attempt()
        cases.append(Case(name, proof, poc.verify(proof, model, sample=SAMPLE, expect=round)))
        if progress:
            progress((index + 1) * NONCES, len(attempts) * NONCES)
    return cases


def rows(cases: Sequence[Case]) -> list[list[str]]:
    """Return the cells of :data:`COLUMNS` for every case."""
    return [
        [
            case.name,
            f"{case.proof.distances.mean():.5f}",
            f"{case.proof.valid_rate:.1%}",
            f"{np.abs(case.verdict.residuals).max():.2g}",
            str(case.verdict.checked),
            case.verdict.verdict,
        ]
        for case in cases
    ]


def summary(cases: Sequence[Case]) -> list[dict[str, object]]:
    """Return JSON-ready values for every case."""
    return [
        {
            "name": case.name,
            "verdict": case.verdict.verdict,
            "mean_distance": float(case.proof.distances.mean()),
            "valid_rate": case.proof.valid_rate,
            "largest_residual": float(np.abs(case.verdict.residuals).max()),
            "checked": case.verdict.checked,
        }
        for case in cases
    ]


def draw(report: "Report", model: "Model", honest: Sequence[Case], cheaters: Sequence[Case]) -> None:
    """Add what was proved, the histogram over the chord law, and who was caught."""
    report.section("Proof of Compute: distances follow the chord law")
    report.paragraph(
        f"Noise seeded by block, key and nonce went through {model.reference} "
        f"({model.num_layers} layers, {model.dtype}, {SEQ_LEN} positions per nonce). The last hidden state was "
        "randomised and reduced to one distance. A validator with the same model recomputed a random sample of "
        "every proof."
    )
    _draw_histogram(report, honest)
    report.section("Verdicts")
    _draw_tables(report, honest, cheaters)
    report.section("How far off the cheaters were")
    _draw_residuals(report, honest[0], cheaters)


def _draw_histogram(report: "Report", honest: Sequence[Case]) -> None:
    from assay import stats
    from assay.poc.protocol import RANDOM_HEAD_ROWS
    from assay.reports import SERIES, figure, histogram_over_density, legend

    r_target = honest[0].proof.round.r_target
    distances = np.concatenate([case.proof.distances for case in honest])
    law = stats.BlockLaw(dimension=RANDOM_HEAD_ROWS, freedom=stats.EFFECTIVE_DIMENSION)
    expected, error = law.valid_rate(r_target), law.rate_error(r_target, len(distances))
    fig, ax = figure()
    histogram_over_density(
        ax,
        distances,
        lambda x: stats.chord_pdf(x, RANDOM_HEAD_ROWS),
        density_label=f"chord law, d = {RANDOM_HEAD_ROWS}",
    )
    ax.axvline(r_target, color=SERIES[1], linewidth=1.3, label=f"r_target {r_target}")
    ax.set_xlabel("distance to the target")
    legend(ax)
    report.figure(fig, f"{len(distances)} honest distances over the density of a random direction.")
    report.definitions(
        {
            "valid, measured": f"{(distances < r_target).mean():.2%}",
            "valid, expected over blocks": f"{expected:.2%} ± {error:.2%} (one standard error of nonces and block)",
            "mean, measured": f"{distances.mean():.5f}",
            "mean, chord law": f"{stats.chord_mean(RANDOM_HEAD_ROWS):.5f}",
        }
    )


def _draw_tables(report: "Report", honest: Sequence[Case], cheaters: Sequence[Case]) -> None:
    from assay.reports import Badge

    kinds: dict[str, BadgeKind] = {"honest": "pass", "fraud": "fail", "undecided": "undecided"}
    for caption, cases in (("honest nodes", honest), ("cheaters", cheaters)):
        cells: list[list[Cell]] = [[*row[:-1], Badge(row[-1], kinds[row[-1]])] for row in rows(cases)]
        report.table(COLUMNS, cells, caption=caption)


def _draw_residuals(report: "Report", honest: Case, cheaters: Sequence[Case]) -> None:
    from assay import stats
    from assay.reports import SERIES, figure, legend

    fig, ax = figure()
    for index, case in enumerate([honest, *cheaters]):
        residuals = np.maximum(np.abs(case.verdict.residuals), stats.RESOLUTION)
        ax.semilogy(sorted(residuals), color=SERIES[index % len(SERIES)], label=case.name, linewidth=1.6)
    ax.axhline(honest.verdict.sequential.gross_threshold, linestyle=":", linewidth=1, color=SERIES[0])
    ax.set_xlabel("checked nonces, sorted")
    ax.set_ylabel("|received − recomputed|")
    legend(ax)
    report.figure(
        fig,
        "Residuals of one honest node and of every cheater. Honest noise exceeds the dotted line once in 10 000. "
        f"A residual of 0 is drawn at {stats.RESOLUTION:.1e}, the resolution of float32.",
    )
