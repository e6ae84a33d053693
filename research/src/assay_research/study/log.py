"""The log of one run: JSON Lines, a header, then a line per stretch of steps, and evaluations::

    {"kind":"run","schema":"assay.vhack.study/1","run":"adam/none/0","condition":"adam/none","seed":0,…}
    {"kind":"step","step":4,"hack":0.11,…}                      means over the steps up to this one
    {"kind":"evaluation","step":300,"markers":"training","hack":0.98,"solve":0.01,…}
    {"kind":"source","step":0,"source":"teacher","cin":0.31}        where there are stored rollouts

Check 4 of hack directions reads the last kind. Logs of `assay vhack train` are read as well; they
have a line for every step, and no evaluations.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay.errors import DataError, UsageError
from assay.files.jsonl import read_jsonl
from assay.vhack.directions.delta.arms import arm_named
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.names import LOG, STUDY
from assay.vhack.training.log import read_records

_UNNAMED = "generated:96"  # default pairs of the first version, which names of conditions leave out


class RunLog:
    """What is known of one run.

    Args:
        header: First line.
        lines: Other lines, in their order.
    """

    def __init__(self, header: Mapping[str, Any], lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.header = dict(header)
        self._lines = [dict(line) for line in lines]

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self._lines if line["kind"] == kind]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of steps."""
        return self._of("step")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of evaluations."""
        return self._of("evaluation")

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Lines of cin by source."""
        return self._of("source")

    @classmethod
    def read(cls, path: str | Path) -> "RunLog":
        """Read a log of a study or of `assay vhack train`.

        Raises:
            DataError: The file cannot be read or is not a log of a run; the message names the line.
        """
        first = next(iter(read_jsonl(path)), None)
        if first is not None and first[1].get("schema") == LOG:
            return _of_training(Path(path))
        lines = []
        for number, line in read_jsonl(path):
            if line.get("kind") not in ("run", "step", "evaluation", "source"):
                raise _bad(f"{path}, line {number}")
            lines.append(line)
        if (
            not lines
            or lines[0].get("schema") != STUDY
            or not {"run", "condition", "seed"} <= lines[0].keys()
        ):
            raise _bad(str(path))
        return cls(lines[0], lines[1:])


def _of_training(path: Path) -> RunLog:
    """Return a log of `assay vhack train` under the names that a study gives."""
    head, *lines = read_records(path)
    try:
        settings = head["settings"]
        usual = (
            settings["pairs"] == _UNNAMED
            or settings["basis"]
            or not arm_named(settings["arm"]).acts
        )
        condition = condition_of(
            settings["optimizer"],
            settings["arm"],
            axes="" if usual else Path(settings["pairs"]).name,
            only=() if set(settings["modes"]) >= set(CHANNELS) else settings["modes"],
            taught=bool(settings["teacher"]),
        )
        seed = settings["seed"]
        named = {
            "condition": condition,
            "run": f"{condition}/{seed}",
            "seed": seed,
            "modes": settings["modes"],
        }
        header = {**head, **named}
    except (KeyError, TypeError, UsageError) as error:
        raise _bad(str(path)) from error
    # Without a teacher there is nothing to compare a source with.
    kinds = ("step", "source") if settings["teacher"] else ("step",)
    return RunLog(header, [line for line in lines if line["kind"] in kinds])


def condition_of(optimizer: str, arm: str, *, axes: str, only: Sequence[str], taught: bool) -> str:
    """Return the word for a condition.

    Args:
        optimizer: Name of the optimizer.
        arm: Name of the arm.
        axes: Name of the axes; empty for the usual ones.
        only: Loopholes that it is trained on; empty for all.
        taught: Whether stored rollouts join in.
    """
    parts = (
        optimizer,
        arm,
        axes,
        f"only-{'+'.join(only)}" if only else "",
        "teacher" if taught else "",
    )
    return "/".join(part for part in parts if part)


def _bad(where: str) -> DataError:
    return DataError(
        where,
        wanted=f"the log of a run, {STUDY}",
        do="name logs of a study, or of assay vhack train",
    )


def _check_rates(path: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a log without steps, or without rates, as one of a reward that says no more than what
    it pays.
    """
    if not steps:
        raise DataError(
            f"{path}: no step yet",
            wanted="a run of some steps",
            do="wait for them, or leave the run out",
        )
    for name in ("step", "hack", "solve"):
        if any(type(line.get(name)) not in (int, float) for line in steps):
            raise DataError(
                f"{path}: steps without {name!r}, or with another one than a number",
                wanted="the rates of every step, as a run logs them whose reward says what it "
                "knows",
                do="let a reward of your own return mappings with exploited and correct",
            )


def read_logs(paths: Iterable[str | Path]) -> list[RunLog]:
    """Return the logs in files, in all ``*.jsonl`` files of directories, or else in all run
    directories in them.

    Raises:
        DataError: A file is not a run log, a log has no steps or no rates, no logs were found, or
            two describe the same run.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.jsonl")) or sorted(path.glob("*/log.jsonl"))
        files += inside if path.is_dir() else [path]
    logs = [RunLog.read(file) for file in files]
    for file, log in zip(files, logs, strict=True):
        _check_rates(file, log.steps)
    names = [log.header["run"] for log in logs]
    twice = [name for name in names if names.count(name) > 1]
    if not logs or twice:
        raise DataError(
            f"run {twice[0]} twice" if twice else "no logs",
            wanted="one log per run",
            do="name files or directories (RESULTS)",
        )
    return logs
