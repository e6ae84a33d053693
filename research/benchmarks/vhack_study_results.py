r"""The figures of docs/vhack-results.md, from the logs of a study.

    python benchmarks/vhack_study_results.py LOGS --keep benchmarks/results/vhack_study \
        -o benchmarks/results/vhack_study.json

``--keep`` writes the logs with fewer columns, which is what is committed. ``--name vhack_study2`` for the second
experiment.
"""

import json
from dataclasses import asdict
from pathlib import Path

from _common import parser, publish
from vhack_study import write

from assay.reports import read_json
from assay.research.study import RunLog, read_logs, source_checks, study_page, summarise
from assay.research.study._summary import mean_of, numbers, paired
from assay.vhack.checks import CheckReport
from assay.vhack.environment import CHANNELS

KEPT = (
    *("kind", "step", "hack", "solve", "vacuous", "tokens", "cin", "cin_s", "cin_t", "leak", "gradient_norm"),
    *("displacement", "displacement_hackward", "watched_displacement"),
)


HELD = "adam/displaced-0.4+erase-update-two-sided"
CONTRASTS = (
    ("adam/erase-gradient", "adam/erase-gradient/axes-random"),
    ("adam/erase-gradient", "adam/erase-gradient/axes-shuffled"),
    ("adam/erase-gradient/axes-svd", "adam/erase-gradient/axes-random"),
    ("adam/erase-gradient/axes-svd", "adam/erase-gradient/axes-shuffled"),
    ("adam/erase-gradient", "adam/constant-push"),
    ("adam/erase-gradient", "adam/advantage-modification"),
    ("adam/erase-gradient/axes-random", "adam/none"),
    ("sgd/erase-gradient", "sgd/erase-update"),
    (f"{HELD}/axes-whole", "adam/advantage-modification"),
    (f"{HELD}/axes-whole", f"{HELD}/axes-random"),
    (f"{HELD}/axes-whole", HELD),
    (f"{HELD}/axes-whole", "adam/displaced-0.4+none/axes-whole"),
    (f"{HELD}/axes-whole", "adam/erase-update-two-sided/axes-whole"),
    ("adam/erase-gradient+away-0.2/axes-whole:20", "adam/advantage-modification"),
)
"""Arms to compare directly, the first less the second, where there are both."""


def rates_of(logs):
    """The rates of every run, by condition and seed."""
    horizon = min(log.steps[-1]["step"] for log in logs)
    table = {}
    for log in logs:
        table.setdefault(log.header["condition"], {})[log.header["seed"]] = numbers(log, horizon)
    return table


def contrasts(table):
    """Differences of the rates at the end, paired by seed."""
    found = {}
    for one, other in CONTRASTS:
        first, second = table.get(one, {}), table.get(other, {})
        seeds = [seed for seed in first if seed in second]
        if not seeds:
            continue
        found[f"{one} less {other}"] = {
            what: asdict(paired([first[s][what] - second[s][what] for s in seeds]))
            for what in ("hack", "solve", "hack_late", "solve_late")
        }
    return found


def left_out(table):
    """For axes without one mechanism: the hack rate on held-out tasks with that loophole, and less the reference's."""
    found = {}
    for condition, own in table.items():
        mode, reference = condition.rpartition(":")[2], table.get(f"{condition.split('/')[0]}/no-loophole", {})
        if mode in CHANNELS and all(f"hack_{mode}" in row for row in own.values()):
            seeds = [seed for seed in own if seed in reference]
            rate = f"hack_{mode}"
            found[condition] = {
                "hack": asdict(mean_of([row[rate] for row in own.values()])),
                "less_no_loophole": asdict(paired([own[s][rate] - reference[s][rate] for s in seeds])),
            }
    return found


def over_time(logs, width=50):
    """Hack rates of rollouts by stretches of steps, mean over seeds."""
    table = {}
    for log in logs:
        parts = {}
        for line in log.steps:
            parts.setdefault(line["step"] // width, []).append(line["hack"])
        for part, values in parts.items():
            mean = sum(values) / len(values)
            table.setdefault(log.header["condition"], {}).setdefault(f"{part * width + 1}", []).append(mean)
    return {name: {part: asdict(mean_of(v)) for part, v in parts.items()} for name, parts in table.items()}


def first_sources(logs, steps=4):
    """Shares along the axes by source, before a run has learned the exploit itself: means of a few steps over seeds."""
    table = {}
    for log in logs:
        for source in ("student", "teacher"):
            found = [line["cin"] for line in log.sources if line["source"] == source and line["step"] < steps]
            if found:
                table.setdefault(log.header["condition"], {}).setdefault(source, []).append(sum(found) / len(found))
    return {name: {key: asdict(mean_of(values)) for key, values in row.items()} for name, row in table.items()}


def graded(folder):
    """From what the parts of a study have said: completions, programs run, and the share of time spent waiting."""
    lines = [json.loads(text) for path in folder.glob("*.txt") for text in path.open() if text.startswith("{")]
    times = [line for line in lines if "grading" in line]
    waited = [time["grading"] / sum(time.values()) for time in times]
    return {
        "completions": sum(line.get("asked", 0) for line in lines),
        "programs_run": sum(line.get("graded", 0) for line in lines),
        "waited": [min(waited), max(waited)],
    }


def kept(log):
    """The log without columns that no figure here uses."""
    own = log.header["basis"] == "true"
    lines = []
    for line in (*log.steps, *log.sources, *log.evaluations):
        if line["kind"] == "step":
            line = {k: v for k, v in line.items() if k in KEPT and not (own and k.startswith("watched"))}
        lines.append(line)
    return RunLog(log.header, lines)


def brief(check):
    """What was measured and decided, without the draws of the nulls."""
    measured = None if check.measured is None else asdict(check.measured)
    return {"measured": measured, "p_values": dict(check.p_values), "verdict": check.verdict, "reason": check.reason}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("logs", type=Path)
    arguments.add_argument("--name", default="vhack_study")
    arguments.add_argument("--keep", type=Path)
    arguments.add_argument("--said", type=Path, help="directory of what the parts of the study have said")
    arguments.add_argument("--check", type=Path, action="append", default=[], help="reports of checks of the axes")
    arguments.add_argument("--page", type=Path)
    given = arguments.parse_args()
    logs = read_logs([given.logs])
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        write(map(kept, logs), given.keep)
    checks = [CheckReport.from_dict(read_json(path)) for path in given.check]
    if given.page:
        study_page(logs, checks=checks, command="python benchmarks/vhack_study_results.py").write(given.page)
    table, found = rates_of(logs), source_checks(logs)
    by_arm = {}
    for name, check in found:
        by_arm.setdefault(name.rpartition("/")[0], []).append(check.measured.value)
    ran = {name: logs[0].header[name] for name in ("commit", "device", "torch", "model", "sandbox", "settings")}
    steps = [log.steps[-1]["step"] + 1 for log in logs]
    publish(
        given.name,
        {
            "ran": ran,
            "runs": len(logs),
            "steps": [min(steps), max(steps)],
            "start": next(log.evaluations for log in logs if log.evaluations and log.evaluations[0]["step"] == 0)[:2],
            "arms": [result.as_dict() for result in summarise(logs)],
            "contrasts": contrasts(table),
            "left_out": left_out(table),
            "hack_over_time": over_time(logs),
            "first_sources": first_sources(logs),
            **({"graded": graded(given.said)} if given.said else {}),
            "check_4": {name: brief(check) for name, check in found},
            "check_4_over_seeds": {arm: asdict(mean_of(values)) for arm, values in by_arm.items()},
            "checks_of_the_axes": [
                {"design": report.design, "checks": {check.title: brief(check) for check in report.checks}}
                for report in checks
            ],
        },
        given.output,
    )


if __name__ == "__main__":
    main()
