"""``assay demo``: both instruments on a bundled model, in under a minute on two cores."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import click
import numpy as np
from pydantic import Field

from assay.cli.flags import FOLDER, MODEL
from assay.cli.framework import without_collection
from assay.cli.output import emit_json, progress_bar, table
from assay.cli.vhack import check_table, print_checks
from assay.settings import Settings

if TYPE_CHECKING:
    from assay.models.load import Model
    from assay.pages.report import BadgeKind, Report
    from assay.poc.protocol.proof import Proof
    from assay.poc.protocol.round import Round
    from assay.poc.verdict.judge import Verdict
    from assay.vhack.checks.judge import CheckReport


BLOCKS = ("block_alpha", "block_beta", "block_gamma")
KEYS = ("node_A", "node_B", "node_C")
SEQ_LEN = 16  # a sixteenth of the default: a demonstration should be over before coffee
NONCES = 64
SAMPLE = 32
COLUMNS = ("node", "mean distance", "valid", "largest residual", "checked", "verdict")
PAIRS = 40  # the least for which lda passes every check on the bundled models
DRAWS = {"n_null": 49, "n_splits": 10, "n_resamples": 1000}  # half of those of `assay vhack check`


class Case(NamedTuple):
    """One proof and what the validator said of it."""

    name: str
    proof: "Proof"
    verdict: "Verdict"

    def summary(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "name": self.name,
            "verdict": self.verdict.verdict,
            "mean_distance": float(self.proof.distances.mean()),
            "valid_rate": self.proof.valid_rate,
            "largest_residual": float(np.abs(self.verdict.residuals).max()),
            "checked": self.verdict.checked,
        }

    def row(self) -> list[str]:
        """Return the cells of :data:`COLUMNS`."""
        _, verdict, mean, rate, largest, checked = self.summary().values()
        return [self.name, f"{mean:.5f}", f"{rate:.1%}", f"{largest:.2g}", str(checked), verdict]


def run_rounds(model: "Model") -> tuple[list[Case], list[Case]]:
    """Prove and verify one round per block and key, and then let four cheaters claim the first of them."""
    from assay import poc
    from assay.poc import cheats

    def judge(label: str, attempts: "Sequence[tuple[str, Round, Callable[[], Proof]]]") -> list[Case]:
        """Make proofs that are to be of a round, and let a validator with the real model judge them."""
        cases = []
        with progress_bar(label) as progress:
            for name, round, prove in attempts:
                proof = prove()
                cases.append(Case(name, proof, poc.verify(proof, model, sample=SAMPLE, expect=round)))
                if progress:
                    progress(len(cases) * NONCES, len(attempts) * NONCES)
        return cases

    shared: dict[str, Any] = {"seq_len": SEQ_LEN, "model": model.reference}
    rounds = [poc.Round(block_hash=block, public_key=key, **shared) for block in BLOCKS for key in KEYS]
    names = [f"{one.block_hash} {one.public_key}" for one in rounds]
    provers = [partial(poc.prove, model, one, range(NONCES)) for one in rounds]
    honest = judge("honest nodes", list(zip(names, rounds, provers, strict=True)))
    first, skipped = rounds[0], max(1, model.num_layers // 4)
    cheaters: dict[str, Callable[[], Proof]] = {
        "weights rounded to int4": lambda: poc.prove(cheats.rounded(model), first, range(NONCES)),
        f"last {skipped} layers skipped": lambda: poc.prove(
            cheats.without_last_layers(model, skipped), first, range(NONCES)
        ),
        "distances invented": lambda: cheats.invented(honest[0].proof),
        "another node's proof": lambda: cheats.replayed(honest[1].proof, first),
    }
    return honest, judge("cheaters", [(name, first, prove) for name, prove in cheaters.items()])


def draw(
    report: "Report", model: "Model", honest: Sequence[Case], cheaters: Sequence[Case], checked: "CheckReport"
) -> None:
    """Add what was proved, its distances beside the chord law, who was caught and how far off, and the checks."""
    from assay import stats
    from assay.pages.report import SERIES, Badge, figure, legend
    from assay.poc import measure_block_factor
    from assay.stats.chord import RANDOM_HEAD_ROWS, chord_mean
    from assay.stats.noise import RESOLUTION

    report.section("Proof of Compute: distances follow the chord law")
    report.paragraph(
        f"Noise seeded by block, key and nonce went through {model.reference} "
        f"({model.num_layers} layers, {model.dtype}, {SEQ_LEN} positions per nonce). The last hidden state was "
        "randomised and reduced to one distance. A validator with the same model recomputed a random sample of "
        "every proof."
    )
    r_target = honest[0].proof.round.r_target
    distances = np.concatenate([case.proof.distances for case in honest])
    effective = measure_block_factor(model, honest[0].proof.round, nonces=NONCES).effective_dimension
    law = stats.BlockLaw(dimension=RANDOM_HEAD_ROWS, freedom=effective)
    expected, error = law.valid_rate(r_target), law.rate_error(r_target, len(distances))
    report.definitions(
        {
            "valid, measured": f"{(distances < r_target).mean():.2%}",
            "valid, expected over blocks": f"{expected:.2%} ± {error:.2%} (one standard error of nonces and block)",
            "mean, measured": f"{distances.mean():.5f}",
            "mean, chord law": f"{chord_mean(RANDOM_HEAD_ROWS):.5f}",
        }
    )
    report.section("Verdicts")
    kinds: dict[str, BadgeKind] = {"honest": "pass", "fraud": "fail", "undecided": "undecided"}
    for caption, cases in (("honest nodes", honest), ("cheaters", cheaters)):
        rows = [case.row() for case in cases]
        report.table(COLUMNS, [[*row[:-1], Badge(row[-1], kinds[row[-1]])] for row in rows], caption=caption)
    report.section("How far off the cheaters were")
    fig, ax = figure()
    for index, case in enumerate([honest[0], *cheaters]):
        residuals = np.maximum(np.abs(case.verdict.residuals), RESOLUTION)
        ax.semilogy(sorted(residuals), color=SERIES[index % len(SERIES)], label=case.name, linewidth=1.6)
    if honest[0].verdict.sequential is not None:
        ax.axhline(honest[0].verdict.sequential.gross_threshold, linestyle=":", linewidth=1, color=SERIES[0])
    ax.set_xlabel("checked nonces, sorted")
    ax.set_ylabel("|received − recomputed|")
    legend(ax)
    report.figure(
        fig,
        "Residuals of one honest node and of every cheater. Honest noise exceeds the dotted line once in 10 000. "
        f"A residual of 0 is drawn at {RESOLUTION:.1e}, the resolution of float32.",
    )
    report.section("v_hack: do the hack directions hold on tasks they were not made from?")
    report.paragraph(
        f"{PAIRS} generated pairs, same prompt and same correct solution; one side cheats its test, the other does "
        f"not. Gradients of {model.reference} were taken in the singular basis of every weight matrix, in "
        f"{model.dtype}. Directions come from some task groups and are scored on the others."
    )
    columns, found = check_table(checked)
    report.table(columns, [[*row[:-1], Badge(row[-1], row[-1])] for row in found])  # type: ignore[arg-type]
    report.paragraph(
        "The pairs are generated and the tasks are small, so this is a demonstration. `assay vhack check` tests "
        "pairs of your own with twice the draws and gives the full report, with rules, nulls and intervals."
    )


class DemoSettings(Settings):
    """Settings of ``assay demo``."""

    model: Annotated[str, MODEL] = Field("reference:qwen3", description="Model that proves.")
    output: Annotated[Path, FOLDER] = Field(Path("demo"), description="Directory of the report.")


@without_collection()
def demo(chosen: DemoSettings, as_json: bool) -> None:
    """Try both instruments on a bundled model.

    Proves and verifies real compute, catches four cheaters, tests hack directions, and writes an HTML report.
    """
    from assay.models.load import load_model, model_info
    from assay.pages.report import Report

    model_info(chosen.model)  # before a directory is made
    chosen.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    loaded = load_model(chosen.model)
    honest, cheaters = run_rounds(loaded)
    checked = _run_checks(loaded)
    seconds = time.perf_counter() - started
    honest[0].proof.save(chosen.output / "proof.jsonl", overwrite=True)
    page = chosen.output / "report.html"
    report = Report("assay on a bundled model", f"Proof of Compute and v_hack in {seconds:.0f} s", command="assay demo")
    draw(report, loaded, honest, cheaters, checked)
    report.write(page)
    caught = sum(case.verdict.fraud for case in cheaters)
    passed = sum(case.verdict.honest for case in honest)
    if as_json:
        found = [(one.name, one.verdict, one.measured and one.measured.value) for one in checked.checks]
        values = {
            "honest": [case.summary() for case in honest],
            "cheaters": [case.summary() for case in cheaters],
            "all_as_expected": passed == len(honest) and caught == len(cheaters),
            "vhack": [dict(zip(("name", "verdict", "value"), one, strict=True)) for one in found],
            "seconds": round(seconds, 1),
            "report": str(page),
        }
        emit_json("assay.demo/1", values)
        return
    table(COLUMNS, [case.row() for case in (*honest, *cheaters)], title="Proof of Compute")
    print_checks(checked, title="v_hack")
    held = sum(check.verdict == "pass" for check in checked.checks)
    click.echo(
        f"{passed} of {len(honest)} honest nodes passed, {caught} of {len(cheaters)} cheaters caught\n"
        f"v_hack: {held} of {len(checked.checks)} checks passed    both in {seconds:.0f} s\n"
        f"report: {page}    a proof to verify yourself: {chosen.output / 'proof.jsonl'}"
    )


def _run_checks(model: "Model") -> "CheckReport":
    """Extract gradients of generated pairs and run the checks, whole task groups held out."""
    from assay.streams.backends import dtype_name
    from assay.vhack.basis.extract import pair_gradients
    from assay.vhack.checks.five_checks import check_gradients
    from assay.vhack.checks.judge import CheckSettings
    from assay.vhack.gradients.svd import weight_svd
    from assay.vhack.pairs.generate import generate_pairs

    # As on a GPU: factors in bfloat16 where the weights are, from the quicker decomposition, which measures its error.
    factors = "bfloat16" if dtype_name(model.dtype) == "bfloat16" else None
    svd = weight_svd(model, dtype=factors, method="gram")
    with progress_bar("hack directions", "samples") as progress:
        gradients = pair_gradients(generate_pairs(PAIRS), model, svd=svd, progress=progress)
    return check_gradients(gradients, settings=CheckSettings(method="lda", **DRAWS))
