"""The log of a run: JSON Lines, written as it goes, continued without repeating a line."""

from pathlib import Path
from typing import Any

from assay.errors import DataError
from assay.files.jsonl import JsonObject, dumps, read_jsonl
from assay.files.storage import storage_error, write_jsonl

LOG_SCHEMA = "assay.vhack.train/1"
"""Schema that the first line of a training log names."""


class TrainLog:
    """A log that is being written.

    The first line says what the run is; ``kind`` tells lines apart::

        {"kind": "run", "schema": "assay.vhack.train/1", "settings": {…}, "commit": …, …}
        {"kind": "step", "step": 0, "hack": 0.12, "solve": 0.55, "loss": …, "cin": …, "leak": …, "displacement": …, …}
        {"kind": "source", "step": 0, "source": "teacher", "cin": 0.31, "cin_two_sided": …, "rollouts": 4, …}
        {"kind": "refresh", "step": 40, "overlap": 0.8}
        {"kind": "end", "steps": 100}

    ``step`` counts from 0. A **step** line has

    - of the student's rollouts: ``hack`` (paid, and not correct), ``solve`` (correct), ``vacuous`` (the channel would
      accept a wrong solution too, correct or not), ``rollouts``; those of the teacher's end in ``_teacher``;
    - ``reward`` (mean of all, as the arm pays it, before advantage modification), ``loss``, ``seconds``;
    - ``ratio_teacher``: mean importance weight of the teacher's tokens; ``clipped_teacher``: the share of them outside
      the clipping range;
    - ``cin``, ``cout``, ``leak`` (each also ``_two_sided`` and ``_energy``), ``displacement``, ``displacement_norm``,
      ``displacement_hackward`` along the axes the arm acts on, see :class:`assay.vhack.delta.ProjectedOptimizer`. Where
      these are control axes, the numbers along the true ones begin with ``watched_``;
    - ``cin_s`` and ``cin_t``: of the summed gradient of the student's rollouts and of the teacher's, along true axes.

    A **source** line is one measurement for check 4 (:func:`assay.vhack.checks.read_source_log`): cin of the summed
    gradient of some rollouts, along the true axes, from the backward pass of all. Sources are ``student`` and
    ``teacher``, and among the student's ``exploited`` and ``correct``. A source without rollouts in a step, or whose
    gradient is zero because all rewards of its groups were equal, has no line. A **refresh** line says how much of the
    axes stayed: the mean squared cosine of the principal angles between old and new ones, over modules.

    Args:
        path: File to write.
        head: What the first line says besides kind and schema.
        step: Steps that the checkpoint has from which the run goes on. Lines of later steps are dropped; 0 starts a new
            file.

    Raises:
        DataError: The file should be continued and is not such a log.
        StorageError: The file cannot be written.
    """

    def __init__(self, path: Path, head: JsonObject, *, step: int = 0) -> None:
        self.path = path
        records: list[JsonObject] = [{"kind": "run", "schema": LOG_SCHEMA, **head}]
        if step:
            records = [r for r in read_records(path) if r["kind"] != "end" and r.get("step", 0) < step]
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
    found: list[JsonObject] = []
    try:
        for _, record in read_jsonl(path):
            found.append(record)
    except DataError:
        if not found or path.read_bytes().endswith(b"\n"):
            raise
    if not found or found[0].get("schema") != LOG_SCHEMA or any("kind" not in record for record in found):
        raise DataError(f"{path} is not a training log", wanted=f"schema {LOG_SCHEMA}", do="choose another directory")
    return found
