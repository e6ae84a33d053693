"""The log of a run: JSON Lines, written as it goes, continued without repeating a line."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from assay.errors import DataError
from assay.files.jsonl import JsonObject, dumps, read_jsonl
from assay.files.storage import storage_error, write_jsonl
from assay.vhack.names import LOG

LARGEST = 1e150  # number in a step: its square is finite too


class TrainLog:
    """The log of a run, while it is written.

    The first line says what the run is; ``kind`` tells lines apart::

        {"kind": "run", "schema": "assay.vhack.train/1", "settings": {…}, "commit": …, …}
        {"kind": "step", "step": 0, "hack": 0.12, "solve": 0.55, "loss": …, "cin": …,
         "leak": …, "displacement": …, …}
        {"kind": "source", "step": 0, "source": "teacher", "cin": 0.31, "cin_two_sided": …,
         "rollouts": 4, …}
        {"kind": "refresh", "step": 40, "overlap": 0.8}
        {"kind": "end", "steps": 100}

    ``step`` counts from 0. A **step** line has

    - of the student's rollouts: ``hack`` (paid, and not correct), ``solve`` (correct), ``vacuous``
      (the channel would accept a wrong solution too, correct or not), ``rollouts``; those of the
      teacher's end in ``_teacher``;
    - ``reward`` (mean of all, as the arm pays it, before advantage modification), ``loss``,
      ``seconds``;
    - ``ratio_teacher``: mean importance weight of the teacher's tokens; ``clipped_teacher``: the
      share of them outside the clipping range;
    - ``cin``, ``cout``, ``leak`` (each also ``_two_sided``), ``displacement``,
      ``displacement_norm``, ``displacement_hackward`` along the axes, see
      :class:`assay.vhack.directions.delta.ProjectedOptimizer`;
    - ``flagged``, ``caught``, ``lost`` and ``missed`` of a detector, see :meth:`Outcomes.rates`,
      and ``alarm``, the evidence of :class:`Alarm` that it misses too many, as a share of what the
      alarm takes;
    - ``quarantine``, where there is one: 1 if the second δS wrote with the first in this step, else
      0; it learns in both;
    - ``cin_s`` and ``cin_t``: of the summed gradient of the student's rollouts and of the
      teacher's, along them.

    A **source** line is one measurement: cin of the summed gradient of some rollouts, along the
    axes, from the backward pass of all. Sources are ``student`` and ``teacher``, and among the
    student's ``exploited`` and ``correct``. A source without rollouts in a step, or whose gradient
    is zero because all rewards of its groups were equal, has no line. A **refresh** line says how
    much of the axes stayed: the mean squared cosine of the principal angles between old and new
    ones, over modules.

    Args:
        path: File to write.
        head: What the first line says besides kind and schema.
        step: Steps that the checkpoint has from which the run goes on. Lines of later steps are
            dropped; 0 starts a new file.

    Raises:
        DataError: The file should be continued and is not such a log.
        StorageError: The file cannot be written.
    """

    def __init__(self, path: Path, head: JsonObject, *, step: int = 0) -> None:
        self.path = path
        records: list[JsonObject] = [{"kind": "run", "schema": LOG, **head}]
        if step:
            records = [
                record
                for record in read_records(path)
                if record["kind"] != "end" and record.get("step", 0) < step
            ]
        write_jsonl(path, records)

    def write(self, kind: str, **values: Any) -> None:
        """Add a line.

        Raises:
            StorageError: The file cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(dumps({"kind": kind, **values}) + "\n")
        except OSError as error:
            raise storage_error(self.path, error) from error


def read_steps(path: str | Path) -> tuple[JsonObject, list[JsonObject]]:
    """Return the first line of a log, and its step lines in order.

    Raises:
        DataError: The file is not such a log.
    """
    head, *others = read_records(Path(path))
    return head, [record for record in others if record["kind"] == "step"]


def read_records(path: Path) -> list[JsonObject]:
    """Return all lines of a log; a last one that was cut off in the middle is dropped.

    Raises:
        DataError: The file is not such a log.
    """
    records: list[JsonObject] = []
    try:
        records.extend(record for _, record in read_jsonl(path))
    except DataError:
        # A run that is killed may leave half of its last line, and no other.
        if not records or path.read_bytes().count(b"\n") > len(records):
            raise
    is_log = bool(records) and records[0].get("schema") == LOG
    if not is_log or any("kind" not in record for record in records):
        raise DataError(
            f"{path} is not a training log", wanted=f"schema {LOG}", do="choose another directory"
        )
    # Of other lines the number of their step alone is read as a number.
    numbers = (
        record if record["kind"] == "step" else {"step": record.get("step", 0)}
        for record in records
    )
    check_steps(numbers, str(path))
    return records


def check_steps(steps: Iterable[Mapping[str, Any]], source: str = "a log") -> None:
    """Refuse a step without its number, or with anything but finite numbers beside its kind."""
    for step in steps:
        for name, value in {"step": None, **step}.items():
            if name == "kind":
                continue
            # The bound also keeps numbers out that no figure can draw.
            is_number = not isinstance(value, bool) and hasattr(value, "__float__")
            if not is_number or not -LARGEST < value < LARGEST:
                raise DataError(
                    f"{source}: a step with {name} {value!r:.60}",
                    wanted="a finite number",
                    do="repair or remove the line",
                )
