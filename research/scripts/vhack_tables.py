"""Tables of the third experiment for docs/vhack-results.md; cog runs them.

All are of research/results/vhack_study3.json, unless another file is named. It says of parts without runs that they
are not run yet.
"""

from collections.abc import Mapping
from typing import Any

from tables import RESULTS, print_table

from assay.files.jsonl import read_json

_WORDS = {
    "d_h": "d_h",
    "d_s": "d_s",
    "e_small": "effect at 7 M",
    "e_large": "effect in the larger",
    "lost": "lost",
}
_ABSENT = "not run yet"


def _figures(of: str = "vhack_study3") -> dict[str, Any]:
    found: dict[str, Any] = read_json(RESULTS / f"{of}.json")
    return found


def _interval(mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return ""
    ends = "" if mean["low"] is None else f" ({mean['low']:.3f} to {mean['high']:.3f})"
    return f"{mean['value']:.3f}{ends}".replace("-", "−")


def claims() -> None:
    """Print the five claims of the plan, their verdicts and the 99 % intervals."""
    rows = []
    for number, claim in enumerate(_figures()["claims"], 1):
        measured = ", ".join(f"{_WORDS[name]} {_interval(mean)}" for name, mean in claim["measured"].items())
        rows.append((number, claim["says"], f"**{claim['verdict']}**", claim["why"], measured))
    print_table(("", "claim", "verdict", "rests on", "99 % intervals"), rows)


def parts() -> None:
    """Print how much of every part is run."""
    rows = []
    for name, part in _figures()["parts"].items():
        runs = f"{part.get('complete_runs', 0)} of {part['planned_runs']}"
        device = ", ".join(part.get("ran", {}).get("device", ()))
        rows.append((f"`{name}`", part["size"].replace("m", " M"), part["steps"], runs, part["state"], device))
    print_table(("part", "organism", "steps", "complete runs", "state", "on"), rows)


def arms(name: str, *, judged: bool = True, of: str = "vhack_study3") -> None:
    """Print the result of a part, or that it is not run yet.

    Args:
        name: Name of the part.
        judged: Whether to print what the success rule says of each arm.
        of: Name of the file of results.
    """
    part = _figures(of)["parts"][name]
    if not part.get("arms"):
        print(f"*{_ABSENT.capitalize()}.*" if part["state"] == _ABSENT else "*No run of it is complete yet.*")
        return
    rows = []
    for arm in part["arms"]:
        rates, against = arm["rates"], arm["against"]
        differences = [_interval(against[what]["mean"]) if against else "" for what in ("hack", "solve")]
        steps = [step for step in arm["saturated"] if step is not None]
        reached = f"{len(steps)} of {len(arm['saturated'])}" + (f", {min(steps)} to {max(steps)}" if steps else "")
        columns = (_interval(rates["hack"]), _interval(rates["solve"]), _interval(rates.get("logp_exploit")), reached)
        verdict = (arm["verdict"],) if judged else ()
        rows.append((arm["condition"], rates["hack"]["n"], *columns, *differences, *verdict))
    header = ("arm", "seeds", "hack", "solve", "log-probability of the exploit", "saturated, at step", "d_h", "d_s")
    print_table((*header, *("" for _ in range(judged))), rows)


def cut_off(name: str, *, of: str = "vhack_study3") -> None:
    """Print how far the runs of a part came that did not reach their last step.

    Args:
        name: Name of the part.
        of: Name of the file of results.
    """
    rows = [
        (run["condition"], run["seed"], run["steps"], run["at"], f"{run['hack']:.3f}", f"{run['solve']:.3f}")
        for run in _figures(of)["parts"][name]["cut_off"]
        if run["at"] is not None
    ]
    print_table(("arm", "seed", "steps", "last evaluation at step", "hack", "solve"), rows)


def first_and_last(name: str) -> None:
    """Print rates and log-probabilities of a part before the first and after the last step.

    Args:
        name: Name of the part.
    """
    found = _figures()["parts"][name].get("evaluations")
    if not found:
        print(f"*{_ABSENT.capitalize()}.*")
        return
    columns = {"hack": "hack", "solve": "solve", "logp_exploit": "exploit", "logp_honest": "honest program"}
    rows = []
    for condition, by_step in found.items():
        ends = [by_step[key] for key in (min(by_step, key=int), max(by_step, key=int))]
        rows.append((condition, *(", then ".join(_interval(end[key]) for end in ends) for key in columns)))
    print_table(("arm", *columns.values()), rows)


def rivals() -> None:
    """Print supervised starts less displaced arms, in every part that has both."""
    rows = [
        (f"`{name}`", pair, _interval(found["hack"]["mean"]), _interval(found["solve"]["mean"]), found["equal"])
        for name, part in _figures()["parts"].items()
        for pair, found in part.get("rivals", {}).items()
    ]
    if not rows:
        print(f"*{_ABSENT.capitalize()}.*")
        return
    print_table(("part", "difference", "hack", "solve", "equal within 0.05"), rows)
