"""``assay research``, ``vhack fuzz``, ``poc ledger merge``, and parts of ``poc calibrate`` and
``vhack report``.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
from pydantic import Field

from assay.cli.flags import ARGUMENT, FOLDER, OUTPUT
from assay.errors import UsageError
from assay.framework.commands import Command
from assay.framework.groups import Group
from assay.framework.output import emit_json, progress_bar, show_values, table
from assay.settings import Flag, Settings

if TYPE_CHECKING:
    from assay.cli.calibrate import CalibrateSettings
    from assay.cli.vhack import ReportSettings
    from assay.poc.verdict.calibration_file import Calibration
    from assay_research.clusters.clusters import ClusterPlan
    from assay_research.vector_sets import VectorSet

_FUZZ = "assay.vhack.fuzz/1"
_GRADER = "assay.vhack.fuzz-grader/1"
_OWN_SECONDS = 10.0  # a grader may load tests, or start a sandbox
_EXAMPLE = 120
_COLUMNS = (
    *("cases", "accepted", "exploited", "raised", "timed_out", "overflowed", "crashed"),
    *("grader_raised", "ended_a_step", "graded_as_right"),
)

research = Group("research", "Measure on data that networks published.", panel="Research")


class ClusterSettings(Settings):
    """Folder of a run of ``assay research clusters``."""

    run_name: Annotated[str | None, "NAME"] = Field(
        None, description="Folder of the run; one of the data's name and digest by default."
    )
    output: Annotated[Path, FOLDER] = Field(
        Path("experiments"), description="Directory that holds the folders of all runs."
    )


class FuzzSettings(Settings):
    """Settings of ``assay vhack fuzz``."""

    count: Annotated[int, Flag(("-n", "--count"), unit="CASES")] = Field(
        1000, ge=1, description="Number of cases."
    )
    seed: Annotated[int, "NUMBER"] = Field(
        0, ge=0, description="The same seed gives the same cases."
    )
    kinds: Annotated[tuple[str, ...] | None, Flag(("--kind",), unit="NAME")] = Field(
        None, description="Use cases of this kind only; may be repeated."
    )
    reward: Annotated[str | None, "MODULE:FUNCTION"] = Field(
        None, description="Attack a grader of your own: a reward function."
    )
    grader: Annotated[str | None, "COMMAND"] = Field(
        None,
        description="Attack a grader of your own: a command with {completion}, a file, and perhaps "
        "{problem}, another.",
    )
    problems: Annotated[Path | None, "FILE"] = Field(
        None, description="Problems of your own grader, each with a known solution."
    )
    seconds: Annotated[float | None, "SECONDS"] = Field(
        None,
        gt=0,
        description="Time limit of a run; what hangs is stopped then: 1, or 10 for a grader of "
        "your own.",
    )
    workers: Annotated[int, "NUMBER"] = Field(
        2, ge=1, description="Programs that run at the same time."
    )
    output: Annotated[Path | None, OUTPUT] = Field(None, description="File for the result as JSON.")


class MergeSettings(Settings):
    """Settings of ``assay poc ledger merge``."""

    ledgers: Annotated[tuple[Path, ...], ARGUMENT] = Field(
        description="Ledgers of different validators, or exports of them."
    )
    public_key: Annotated[str | None, "KEY"] = Field(
        None, description="Key of the node to decide on; all nodes if left out."
    )
    alpha: Annotated[float | None, "SHARE"] = Field(
        None,
        description="Bound on the chance that this decision accuses an honest node; else that of "
        "the ledgers.",
    )
    beta: Annotated[float | None, "SHARE"] = Field(
        None,
        description="Bound on the chance that this decision calls a cheater honest; else that of "
        "the ledgers.",
    )
    liars: Annotated[int, "NUMBER"] = Field(
        0, ge=0, description="Ledgers that may be invented without any effect."
    )


@research.add(
    "clusters",
    ClusterSettings,
    "assay_research.clusters.clusters:ClusterPlan",
    example="assay research clusters nonces.jsonl.gz",
    resumable=True,
)
def clusters(own: ClusterSettings, plan: "ClusterPlan", as_json: bool) -> None:
    """Hold every rule against nonces of real clusters.

    Honest machines are left out, other builds are passed off as this one, and cheats are simulated.
    """
    from assay_research.cli.experiment import measure_and_show
    from assay_research.clusters.clusters import run_name_of
    from assay_research.runs.runs import run_folder

    folder = run_folder(own.output, own.run_name or run_name_of(plan.data))
    measure_and_show(plan, folder, as_json, "assay_research.clusters/1", "cells")


def run_fuzz(chosen: FuzzSettings, as_json: bool) -> int:
    """Attack assay's grader with hostile programs, or a grader of your own.

    A grader of your own (--reward or --grader, with --problems) is given completions without work:
    early ends, printed verdicts, objects that equal everything, stubs, orders to a judge. Exit code
    0 if the grader holds, 1 if it pays one or is ended by one, 2 on bad input.
    """
    if chosen.reward or chosen.grader or chosen.problems:
        return _attack_own_grader(chosen, as_json)
    from assay.files.jsonl import dumps
    from assay.files.storage import write_atomic
    from assay.pages.provenance import provenance
    from assay.vhack.environment.backends import available_backend
    from assay.vhack.environment.runs import Limits
    from assay_research.fuzz import fuzz
    from assay_research.hostile import HOSTILE_KINDS

    seconds = chosen.seconds or 1.0
    with progress_bar("grading", "cases") as progress:
        report = fuzz(
            chosen.count,
            seed=chosen.seed,
            kinds=chosen.kinds or HOSTILE_KINDS,
            limits=Limits(seconds=seconds),
            workers=chosen.workers,
            progress=progress,
        )
    values = {
        "seed": chosen.seed,
        "seconds": seconds,
        "backend": available_backend(),
        **report.as_dict(),
    }
    if chosen.output:
        origin = {"command": shlex.join(["assay", *sys.argv[1:]]), **provenance()}
        write_atomic(chosen.output, dumps({"schema": _FUZZ, **origin, **values}) + "\n")
    if as_json:
        emit_json(_FUZZ, values)
        return 0 if report.holds else 1
    rows = [
        (kind, *(counted[name] for name in _COLUMNS))
        for kind, counted in [*report.counts.items(), ("all", report.total)]
    ]
    summary = "the grader holds" if report.holds else "the grader does not hold"
    title = f"{summary}: {report.total['cases']} hostile cases and {report.honest} honest programs"
    table(("kind", *(name.replace("_", " ") for name in _COLUMNS)), rows, title=title)
    for case, did in report.failures:
        click.echo(f"{case}: {did}")
    return 0 if report.holds else 1


def _attack_own_grader(chosen: FuzzSettings, as_json: bool) -> int:
    from assay.files.jsonl import dumps
    from assay.files.storage import write_atomic
    from assay.pages.provenance import provenance
    from assay_research.grader_fuzz import (
        CommandGrader,
        FunctionGrader,
        attack_grader,
        read_problems,
    )

    if chosen.problems is None or (chosen.reward is None) == (chosen.grader is None):
        raise UsageError(
            "a grader of your own that is not described",
            wanted="--problems, and one of --reward and --grader",
            do="give both",
        )
    chosen.refuse(
        ("count", "kinds", "seed", "workers"),
        "--problems",
        wanted="no {flag}: every attack is tried on every problem",
    )
    problems = read_problems(chosen.problems)
    seconds = chosen.seconds or _OWN_SECONDS
    grader: FunctionGrader | CommandGrader = (
        FunctionGrader(chosen.reward, seconds=seconds)
        if chosen.reward is not None
        else CommandGrader(str(chosen.grader), seconds=seconds)
    )
    try:
        with progress_bar("attacking", "attacks") as progress:
            report = attack_grader(grader, problems, progress=progress)
    finally:
        grader.close()
    values = {"grader": chosen.reward or chosen.grader, "limit_s": seconds, **report.as_dict()}
    if chosen.output:
        origin = {"command": shlex.join(["assay", *sys.argv[1:]]), **provenance()}
        write_atomic(chosen.output, dumps({"schema": _GRADER, **origin, **values}) + "\n")
    if as_json:
        emit_json(_GRADER, values)
        return 0 if report.holds else 1
    failed = [result for result in report.attacks if not result.holds]
    verdict = "the grader holds" if report.holds else "the grader does not hold"
    title = f"{verdict}: {len(failed)} of {len(report.attacks)} attacks, {len(problems)} problems"
    rows = [
        (result.name, ", ".join(f"{count} {name}" for name, count in result.outcomes.items()))
        for result in report.attacks
    ]
    table(("attack", "completions"), rows, title=title)
    for result in failed:
        click.echo(f"{result.name}: the grader {result.allows}")
        click.echo(f"  problem {result.problem}: {result.example[:_EXAMPLE]!r}")
    return 0 if report.holds else 1


fuzz = Command("fuzz", run_fuzz, (FuzzSettings,), example="assay vhack fuzz --count 1000")


def run_merge(chosen: MergeSettings, as_json: bool) -> int:
    """Decide from the ledgers of several validators.

    Exit code 0 all honest, 1 a fraud, 2 undecided or bad input. The e-values are averaged, which is
    valid although the validators saw the same proofs. Which ledgers are merged, and when, must not
    depend on what they say. "decided by" names the ledgers that say so alone, "rests on" those
    without any one of which the verdict would be another.
    """
    from assay.cli.ledger import names_of, no_such_key
    from assay_research.ledger_merge import merge_ledgers

    merged = merge_ledgers(
        list(chosen.ledgers), alpha=chosen.alpha, beta=chosen.beta, liars=chosen.liars
    )
    merged_keys = {standing.account.public_key for standing in merged}
    if chosen.public_key is not None and chosen.public_key not in merged_keys:
        raise no_such_key(chosen.public_key, sorted(merged_keys)[:10])
    merged = [
        standing for standing in merged if chosen.public_key in (None, standing.account.public_key)
    ]
    if as_json:
        emit_json(
            "assay.poc.ledger.merge/1", {"accounts": [standing.as_dict() for standing in merged]}
        )
    else:
        rows = []
        for standing in merged:
            merged_keys = (
                f"{sum(share.n > 0 for share in standing.shares)} of {len(standing.shares)}"
            )
            named = [*zip(standing.shares, (path.name for path in chosen.ledgers), strict=True)]
            alone = ", ".join(
                name for share, name in named if share.verdict == standing.verdict != "undecided"
            )
            needed = ", ".join(name for share, name in named if share.ledger in standing.rests_on)
            rows.append(
                (
                    *names_of(standing.account),
                    merged_keys,
                    f"{standing.log_e_value:.1f}",
                    standing.verdict,
                    alone,
                    needed,
                )
            )
        table(
            (
                "key",
                "model",
                "build",
                "preset",
                "ledgers",
                "log e",
                "verdict",
                "decided by",
                "rests on",
            ),
            rows,
        )
    verdicts = {standing.verdict for standing in merged}
    return 1 if "fraud" in verdicts else 0 if verdicts == {"honest"} else 2


merge = Command(
    "merge",
    run_merge,
    (MergeSettings,),
    example="assay poc ledger merge mine.sqlite3 theirs.jsonl --public-key KEY",
)


def calibrate_sets(chosen: "CalibrateSettings") -> "Calibration":
    """Return the calibration of the sets that ``assay poc calibrate --vectors`` names."""
    from assay_research.vector_sets import calibrate_vectors, read_vector_sets

    assert chosen.vectors is not None
    sets = read_vector_sets(chosen.vectors)
    chosen_sets = [vector_set for vector_set in sets if _is_chosen(vector_set, chosen.sets)]
    if len(chosen_sets) < 2:
        names = ", ".join(vector_set.name for vector_set in sets)
        raise UsageError(
            f"{len(chosen_sets)} of the {len(sets)} sets of --vectors chosen",
            wanted="two or more of one build",
            do=f"choose with --sets among {names:.300}",
        )
    with progress_bar("leaving out", "machines") as progress:
        return calibrate_vectors(chosen_sets, digest=chosen.digest, progress=progress)


def _is_chosen(vector_set: "VectorSet", words: Sequence[str]) -> bool:
    """Return whether a set's name has all of the words, and none of those that begin with a
    dash.
    """
    return all(
        word[1:] not in vector_set.name if word.startswith("-") else word in vector_set.name
        for word in words
    )


def report_runs(chosen: "ReportSettings", as_json: bool) -> None:
    """Draw the page of training runs for ``assay vhack report``."""
    from assay.files.jsonl import read_json
    from assay.vhack.directions.checks.check_report import CheckReport
    from assay_research.study.log import read_logs
    from assay_research.study.summary import study_page, summarise

    logs = read_logs(list(chosen.results))
    shown = [CheckReport.from_dict(read_json(path)) for path in chosen.check]
    command = " ".join(["assay vhack report", *(path.name for path in chosen.results)])
    study_page(logs, checks=shown, command=command).write(chosen.output)
    overview = summarise(logs)
    if as_json:
        arms = [result.as_dict() for result in overview]
        show_values(
            "assay.vhack.report/1",
            {"path": str(chosen.output), "runs": len(logs), "arms": arms},
            as_json,
        )
        return
    rows = []
    for result in overview:
        rates = [result.rates[name] for name in ("hack", "solve")]
        rows.append(
            (
                result.condition,
                rates[0].n,
                *(rate.text for rate in rates),
                result.tipped.text,
                result.verdict,
            )
        )
    columns = ("condition", "seeds", "hack rate", "solve rate", "tipped", "verdict")
    table(columns, rows, title=str(chosen.output))
