r"""The figures of the third experiment, from what its parts have kept.

    python research/benchmarks/vhack_study3_results.py OUT --keep LOGS -o research/results/vhack_study3.json
    python research/benchmarks/vhack_study3_results.py LOGS -o research/results/vhack_study3.json

Takes the ``.pt`` files of ``vhack_study3.py`` or the logs that ``--keep`` wrote from them, one directory for each part,
and is given again whenever there are more of them. A part without runs stands there as not run yet.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from _common import note, parser, publish
from _vhack_plan3 import DISPLACED, GATED, HELD, PARTS
from assay_research.study.claims import complete, judged, lasts
from assay_research.study.log import RunLog, read_logs
from assay_research.study.summary import mean_of, numbers, paired, summarise

from assay.errors import UsageError

KEPT = (
    *("kind", "step", "hack", "solve", "vacuous", "tokens", "cin", "gradient_norm", "logp_stored"),
    *("displacement", "displacement_hackward"),
)
RIVALS = (("from-dpo", DISPLACED), ("from-dpo", HELD), ("from-unlikelihood", DISPLACED), ("from-unlikelihood", HELD))
BORROW = ("origins", "mechanisms")
"""Parts whose runs are compared with plain training and the reference of the part ``stored``, seed by seed."""
EQUAL = 0.05
"""Half the width of the margin in which two hack rates count as equal."""


def name_of(part, arm, start=""):
    """The condition of an arm of a part."""
    found = [run for run in PARTS[part].runs if (run.arm, run.start) == (arm, start) and run.basis == "whole"]
    return found[0].condition


def read_parts(folder):
    """The logs of every part, from states and from logs."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for stored in state["logs"].values():
            log = RunLog.of_state(stored)
            found.setdefault(log.header["part"], []).append(log)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in PARTS:
            found.setdefault(path.name, []).extend(read_logs([path]))
    for part, logs in found.items():
        names = [log.header["run"] for log in logs]
        if len(set(names)) < len(names):
            raise UsageError(f"runs of {part} twice in {folder}", wanted="each once", do="leave one of the files out")
    return {part: [log for log in logs if log.steps] for part, logs in found.items() if part != "check"}


def kept(log):
    """The log without columns that no figure here uses."""
    lines = [
        {key: value for key, value in line.items() if line["kind"] != "step" or key in KEPT}
        for line in (*log.steps, *log.evaluations)
    ]
    return RunLog(log.header, lines)


def write(logs, folder):
    """Write the logs as they are, one file per run."""
    for log in logs:
        log.write(folder / (log.header["run"].replace("/", "_").replace(":", "-") + ".jsonl"))


def of(logs, condition):
    """The runs of one condition."""
    return [log for log in logs if log.header["condition"] == condition]


def claims(parts):
    """The five claims of the plan."""
    small = parts.get("stored", [])
    plain, reference = (of(small, name_of("stored", arm)) for arm in ("none", "no-loophole"))
    words = (
        ("displacement alone fails once the exploit is sampled", "fails", DISPLACED),
        ("displaced and held holds", "succeeds", HELD),
        ("displaced with gate and bound holds", "succeeds", GATED),
    )
    found = [
        judged(says, wanted, of(small, name_of("stored", arm)), plain, reference, fewest=5)
        for says, wanted, arm in words
    ]
    held = of(small, name_of("stored", HELD))
    for size in ("30m", "120m"):
        part = f"stored-{size}"
        own = {arm: of(parts.get(part, []), name_of(part, arm)) for arm in ("none", HELD, "no-loophole")}
        says = f"the effect does not fade at {size[:-1]} M"
        found.append(lasts(says, (plain, held), (own["none"], own[HELD]), own["no-loophole"], fewest=3))
    return [asdict(claim) for claim in found]


def rivals(part, logs):
    """Supervised starts less arms that are displaced: the difference of hack rates and whether it counts as none."""
    table = {}
    for log in logs:
        table.setdefault(log.header["condition"], {})[log.header["seed"]] = numbers(log, log.steps[-1]["step"])
    found = {}
    for start, arm in RIVALS:
        names = [run.condition for run in PARTS[part].runs if f"from-{run.start}" == start]
        if not names or name_of(part, arm) not in table or names[0] not in table:
            continue
        own, other = table[names[0]], table[name_of(part, arm)]
        seeds = [seed for seed in own if seed in other]
        difference = {what: paired([own[s][what] - other[s][what] for s in seeds]) for what in ("hack", "solve")}
        low, high = difference["hack"].mean.interval
        equal = "yes" if low >= -EQUAL and high <= EQUAL else "no" if low > EQUAL or high < -EQUAL else "undecided"
        found[f"{start} less {arm}"] = {"equal": equal, **{what: asdict(d) for what, d in difference.items()}}
    return found


def over_time(logs):
    """By condition and step of evaluation, mean log-probability of the exploit and hack rate over seeds."""
    table = {}
    for log in logs:
        for line in log.evaluations:
            at = table.setdefault(log.header["condition"], {}).setdefault(line["step"], {})
            for name in ("hack", "solve", "logp_exploit", "logp_partial", "logp_honest"):
                if name in line:
                    at.setdefault(name, []).append(line[name])
    return {
        condition: {step: {name: asdict(mean_of(v)) for name, v in at.items()} for step, at in steps.items()}
        for condition, steps in table.items()
    }


def cut_off(log):
    """How far a run came that did not reach its last step, and its last evaluation."""
    last = log.evaluations[-1] if log.evaluations else {}
    seen = {"at": last.get("step"), "hack": last.get("hack"), "solve": last.get("solve")}
    named = {name: log.header[name] for name in ("condition", "seed")}
    return named | {"steps": log.steps[-1]["step"] + 1} | seen


def figures(part, logs, first=()):
    """What is known of one part; one without a reference of its own is compared with that of the first part."""
    planned = PARTS[part]
    order = [run.condition for run in planned.runs]
    logs = sorted(logs, key=lambda log: (order.index(log.header["condition"]), log.header["seed"]))
    done = [log for log in logs if complete(log)]
    plan = {"size": planned.size, "planned_runs": len(planned.runs) * planned.seeds, "steps": planned.settings.steps}
    if not logs:
        return {**plan, "state": "not run yet"}
    own = {log.header["condition"] for log in done}
    references = [name_of("stored", arm) for arm in ("none", "no-loophole")]
    borrowed = [log for log in first if part in BORROW and complete(log) and log.header["condition"] in references]
    whole = len(done) == plan["planned_runs"]
    ran = {name: sorted({str(log.header[name]) for log in logs}) for name in ("commit", "device", "torch", "model")}
    return {
        **plan,
        "state": "complete" if whole else "in part",
        "ran": ran,
        "complete_runs": len(done),
        "cut_off": [cut_off(log) for log in logs if not complete(log)],
        "arms": [result.as_dict() for result in summarise([*done, *borrowed]) if result.condition in own],
        "rivals": {} if part == "cpu" else rivals(part, done),
        "evaluations": over_time(done),
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--keep", type=Path, help="directory for the logs with fewer columns")
    given = arguments.parse_args()
    parts = read_parts(given.folder)
    for part, logs in parts.items():
        note(f"{part}: {len(logs)} runs, {sum(map(complete, logs))} of them to the end")
        if given.keep:
            (given.keep / part).mkdir(parents=True, exist_ok=True)
            write(map(kept, logs), given.keep / part)
    made = {part: figures(part, parts.get(part, []), parts.get("stored", [])) for part in PARTS if part != "check"}
    publish("vhack_study3", {"claims": claims(parts), "parts": made}, given.output)


if __name__ == "__main__":
    main()
