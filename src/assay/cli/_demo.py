"""``assay demo``: the whole of Proof of Compute on a bundled model, in under a minute on two cores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from assay.cli._output import JsonFlag, emit_json, progress_bar, table

if TYPE_CHECKING:
    from assay.models import Model
    from assay.poc import Proof, Verdict
    from assay.reports import Cell, Report
    from assay.reports._html import BadgeKind

__all__ = ["demo"]

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
KEYS = ("node_A", "node_B", "node_C")
SEQ_LEN = 64  # a quarter of the default: a demonstration should be over before coffee
NONCES = 96
SAMPLE = 32
DIMENSION = 8192


@dataclass(frozen=True)
class Case:
    """One proof and what the validator said of it."""

    name: str
    proof: "Proof"
    verdict: "Verdict"


def demo(
    model: Annotated[
        str, typer.Option("--model", help="Which model proves.", envvar="ASSAY_MODEL")
    ] = "reference:qwen3",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report and one proof.")] = Path("demo"),
    as_json: JsonFlag = False,
) -> None:
    """Prove and verify real compute, catch four cheaters, and write an HTML report."""
    from assay.errors import StorageError
    from assay.models import load_model

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{output}: {error.strerror}", wanted="a folder to write to", do="pass another -o") from None
    started = time.perf_counter()
    loaded = load_model(model)
    with progress_bar("honest nodes") as progress:
        honest = _honest(loaded, progress)
    with progress_bar("cheaters") as progress:
        cheats = _cheats(loaded, honest, progress)
    seconds = time.perf_counter() - started
    honest[0].proof.save(output / "proof.jsonl", overwrite=True)
    report = output / "report.html"
    _report(loaded, honest, cheats, seconds).write(report)
    if as_json:
        emit_json("assay.demo/1", {**_summary(honest, cheats), "seconds": round(seconds, 1), "report": str(report)})
    else:
        _print(honest, cheats, seconds, output)


def _honest(model: "Model", progress: Callable[[int, int], None] | None) -> list[Case]:
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
        cases.append(Case(f"{round.block_hash} {round.public_key}", proof, poc.verify(proof, model, sample=SAMPLE)))
        if progress:
            progress((index + 1) * NONCES, len(rounds) * NONCES)
    return cases


def _cheats(model: "Model", honest: Sequence[Case], progress: Callable[[int, int], None] | None) -> list[Case]:
    """Let four cheaters claim the first honest round; the validator has the real model."""
    from assay import poc
    from assay.poc import cheats

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
            progress(index + 1, len(attempts))
    return cases


def _summary(honest: Sequence[Case], cheats: Sequence[Case]) -> dict[str, object]:
    def rows(cases: Sequence[Case]) -> list[dict[str, object]]:
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

    right = all(case.verdict.honest for case in honest) and all(case.verdict.fraud for case in cheats)
    return {"honest": rows(honest), "cheaters": rows(cheats), "all_as_expected": right}


def _rows(cases: Sequence[Case]) -> list[tuple[str, ...]]:
    return [
        (
            case.name,
            f"{case.proof.distances.mean():.5f}",
            f"{case.proof.valid_rate:.1%}",
            f"{np.abs(case.verdict.residuals).max():.2g}",
            str(case.verdict.checked),
            case.verdict.verdict,
        )
        for case in cases
    ]


COLUMNS = ("node", "mean distance", "valid", "largest residual", "checked", "verdict")


def _print(honest: Sequence[Case], cheats: Sequence[Case], seconds: float, output: Path) -> None:
    table(COLUMNS, _rows([*honest, *cheats]), title=f"Proof of Compute, {NONCES} nonces each")
    caught = sum(case.verdict.fraud for case in cheats)
    passed = sum(case.verdict.honest for case in honest)
    typer.echo(
        f"{passed} of {len(honest)} honest nodes passed, {caught} of {len(cheats)} cheaters caught, {seconds:.0f} s"
    )
    typer.echo(f"report: {output / 'report.html'}    a proof to verify yourself: {output / 'proof.jsonl'}")


def _report(model: "Model", honest: Sequence[Case], cheats: Sequence[Case], seconds: float) -> "Report":
    """The page: what was proved, the histogram over the chord law, and who was caught."""
    from assay import stats
    from assay.reports import SERIES, Badge, Report, figure, histogram_over_density, legend

    report = Report(
        "Proof of Compute on a bundled model",
        f"{len(honest)} honest rounds and {len(cheats)} cheaters, {NONCES} nonces each, in {seconds:.0f} s",
        command="assay demo",
    )
    report.paragraph(
        f"Noise seeded by block, key and nonce went through {model.reference} "
        f"({model.num_layers} layers, {model.dtype}, {SEQ_LEN} positions per nonce). The last hidden state was "
        "randomised and reduced to one distance. A validator with the same model recomputed a random sample of "
        "every proof."
    )
    r_target = honest[0].proof.round.r_target
    distances = np.concatenate([case.proof.distances for case in honest])
    expected = stats.valid_rate(r_target, DIMENSION)
    error = stats.rate_standard_error(expected, len(distances))
    report.section("Distances follow the chord law")
    fig, ax = figure()
    histogram_over_density(ax, distances, lambda x: stats.chord_pdf(x, DIMENSION), density_label="chord law, d = 8192")
    ax.axvline(r_target, color=SERIES[1], linewidth=1.3, label=f"r_target {r_target}")
    ax.set_xlabel("distance to the target")
    legend(ax)
    report.figure(fig, f"{len(distances)} honest distances over the density of a random direction.")
    report.definitions(
        {
            "valid, measured": f"{(distances < r_target).mean():.2%}",
            "valid, chord law": f"{expected:.2%} ± {error:.2%} (one standard error at this sample size)",
            "mean, measured": f"{distances.mean():.5f}",
            "mean, chord law": f"{stats.chord_mean(DIMENSION):.5f}",
        }
    )
    report.section("Who was believed")
    kinds: dict[str, BadgeKind] = {"honest": "pass", "fraud": "fail", "undecided": "undecided"}
    for caption, cases in (("honest nodes", honest), ("cheaters", cheats)):
        rows: list[list[Cell]] = [[*row[:-1], Badge(row[-1], kinds[row[-1]])] for row in _rows(cases)]
        report.table(COLUMNS, rows, caption=caption)
    report.section("How far off the cheaters were")
    fig, ax = figure()
    for index, case in enumerate([honest[0], *cheats]):
        residuals = np.maximum(np.abs(case.verdict.residuals), stats.RESOLUTION)
        ax.semilogy(sorted(residuals), color=SERIES[index % len(SERIES)], label=case.name, linewidth=1.6)
    ax.axhline(honest[0].verdict.sequential.gross_threshold, linestyle=":", linewidth=1, color=SERIES[0])
    ax.set_xlabel("checked nonces, sorted")
    ax.set_ylabel("|received − recomputed|")
    legend(ax)
    report.figure(
        fig, "Residuals of one honest node and of every cheater. Honest noise exceeds the dotted line once in 10 000."
    )
    return report
