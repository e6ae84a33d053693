"""The run store: what experiments measured, cell by cell, in files that a killed run continues.

A run is a folder. Every experiment has one JSON Lines file in it, ``<experiment>.jsonl``: a header
with the settings, then one line per cell, each under a key of its own. While it is written the file
is ``<experiment>.jsonl.partial``.

    WeightPlan(nonces=256).measure(folder)
    read_run(folder, "weights").cells

Settings are what makes two cells comparable. Which cells are wanted is not among them, so a run
that measured one model may be continued with another.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from assay import streams
from assay.devices import Device
from assay.errors import DataError, UsageError
from assay.files.jsonl import JsonObject, dumps, loads, read_lines
from assay.files.storage import PartialFile, storage_error
from assay.pages.provenance import provenance
from assay.settings import Flag, Names, Settings

KIND = "assay.poc.experiment"
SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
"""Blocks of the published tests."""

Blocks = Annotated[Names, Field(description="Block hashes, separated by commas.")]

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all)."""


Note = Callable[[str], None]
"""Called with a sentence about what happens."""

Measurement = tuple[str, Callable[[], Mapping[str, Any]]]
"""Key of a cell, and the function that measures it."""


Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    Flag(variable="ASSAY_DTYPE"),
    Field(
        description="Dtype of the weights: float32, float16 or bfloat16; by default the one they "
        "are stored in."
    ),
]


class Plan(Settings):
    """What an experiment measures, cell by cell.

    Raises:
        UsageError: A list is too short, repeats an entry or has one that is not known; the message
            names the flag.
    """

    experiment: ClassVar[str]
    """Name of the experiment, and of its file in a run."""

    choosing: ClassVar[frozenset[str]] = frozenset()
    """Settings that say which cells are wanted, and not how they are measured."""

    known: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Words that a list may have, where there are no others."""

    least: ClassVar[Mapping[str, int]] = {}
    """Least number of entries of lists that need more than one."""

    def model_post_init(self, context: Any, /) -> None:
        """Check the lists."""
        for name, values in self:
            if not isinstance(values, tuple):
                continue
            count = self.least.get(name, 1)
            allowed = self.known.get(name, values)
            odd = [value for value in values if value not in allowed]
            if odd or len(values) < count or len(set(values)) < len(values):
                listed = " of " + ", ".join(allowed) if name in self.known else ""
                raise UsageError(
                    f"{name} {', '.join(odd) or repr(values):.80}",
                    wanted=f"{count} or more{listed}, each once",
                    do=f"correct --{name.replace('_', '-')}",
                )

    @property
    def settings(self) -> JsonObject:
        """What must be the same for all cells of a run."""
        chosen = self.model_dump(exclude=set(self.choosing))
        return {name: "default" if value is None else value for name, value in chosen.items()}

    def cells(self) -> Iterable[Measurement]:
        """Return the keys of wanted cells, each with the function that measures it (none if
        `measure` is replaced).
        """
        raise NotImplementedError

    def measure(
        self, folder: Path, *, progress: Progress | None = None, note: Note | None = None
    ) -> None:
        """Measure the cells that a run's folder does not have yet, and append them to the file of
        the experiment.

        Args:
            folder: Folder of the run.
            progress: Function that is called with (cells done, missing cells in all) after every
                cell.
            note: Function that is called with a sentence, where an experiment has something to say.

        Raises:
            UsageError: The run was begun with other settings.
            DataError: The file is not that of an experiment.
            StorageError: The file cannot be written.
        """
        with open_run(folder, self.experiment, self.settings) as run:
            todo = deque(cell for cell in self.cells() if cell[0] not in run.done)
            total = len(todo)
            for finished in range(1, total + 1):
                # Cells are let go of one by one, and with the last cell of a model the model.
                key, measured = todo.popleft()
                run.append(key, measured())
                if progress:
                    progress(finished, total)


class ExperimentPlan(Plan):
    """Settings of every experiment that runs models."""

    known: ClassVar[Mapping[str, Sequence[str]]] = {"dtypes": streams.DTYPES}

    models: Names = Field(
        ("reference:qwen3", "reference:llama"), description="Models, separated by commas."
    )
    seq_len: int = Field(256, ge=1, description="Input positions per nonce.")
    batch_size: int = Field(32, ge=1, description="Nonces per forward pass.")
    device: Device = None


@dataclass(frozen=True)
class RunRecords:
    """What one experiment of a run measured.

    Args:
        experiment: Name of the experiment, such as ``matrix``.
        settings: Settings that were the same for all cells.
        origins: Versions and machine of every process that wrote to the file, the first one first;
            each once.
        cells: Measured values in the order of measurement; ``key`` names the cell.
        complete: Whether the process that wrote last reached its end.
    """

    experiment: str
    settings: JsonObject
    origins: tuple[JsonObject, ...]
    cells: tuple[JsonObject, ...]
    complete: bool


class Run:
    """An experiment's file, open for writing by one process; made by :func:`open_run`."""

    def __init__(
        self, file: PartialFile, cells: Iterable[JsonObject], origin: JsonObject | None
    ) -> None:
        self._file = file
        self._origin = (
            origin  # written before the first cell; a process that adds none leaves no trace
        )
        self._keys = {cell["key"] for cell in cells}

    @property
    def done(self) -> frozenset[str]:
        """Keys of the cells that are measured."""
        return frozenset(self._keys)

    def append(self, key: str, values: Mapping[str, Any]) -> None:
        """Write the values of a cell; they are with the system when this returns.

        Raises:
            UsageError: The key is taken, or the values are not JSON.
            StorageError: The line cannot be written.
        """
        if key in self._keys:
            raise UsageError(
                f"cell {key!r} twice", wanted="every cell once", do="skip the keys in Run.done"
            )
        line = dumps({"key": key, **values})
        if self._origin is not None:
            self._file.append_lines([dumps({"origin": self._origin})])
            self._origin = None
        self._file.append_lines([line])
        self._keys.add(key)


def run_folder(output: Path, name: str) -> Path:
    """Return the folder of the run with this name.

    Raises:
        UsageError: The name is not a plain file name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"run name {name!r:.80}",
            wanted="a letter or digit, then up to 63 letters, digits, dots, dashes and underscores",
            do="for instance --run-name night-1",
        )
    return output / name


@contextmanager
def open_run(folder: Path, experiment: str, settings: Mapping[str, Any]) -> Iterator[Run]:
    """Begin an experiment in a run's folder, or continue it.

    Leaving the ``with`` block without an error gives the file its final name. After an error it
    stays partial, and the next call goes on after the last whole line. A file without a cell is
    removed, so other settings can begin.

    Raises:
        UsageError: It was begun there with other settings, which the message names.
        DataError: The file is not that of an experiment.
        StorageError: The file cannot be written, or another process writes it.
    """
    path = _path(folder, experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _partial(path).exists():
            _check_settings(read_run(folder, experiment).settings, settings, path)
            path.rename(_partial(path))
    except OSError as error:
        raise storage_error(path, error) from error
    with PartialFile(path) as file:
        run = _recovered(file, experiment, settings)
        try:
            yield run
        except BaseException:
            if not run.done:
                _remove(file.partial)
            raise
        file.commit()


def _remove(partial: Path) -> None:
    """Remove a file in which nothing was measured, and its folder if it is empty."""
    with suppress(OSError):
        partial.unlink()
        partial.parent.rmdir()


def _recovered(file: PartialFile, experiment: str, settings: Mapping[str, Any]) -> Run:
    """Read what the file holds, and write the header of a new one."""
    lines = file.recover()
    origin = provenance()
    if not lines:
        header = {
            "kind": KIND,
            "schema": SCHEMA,
            "experiment": experiment,
            "settings": settings,
            "origin": origin,
        }
        file.append_lines([dumps(header)])
        return Run(file, (), None)
    parsed = _parsed([line.encode() for line in lines], file.partial, experiment)
    _check_settings(parsed.settings, settings, file.path)
    return Run(file, parsed.cells, None if origin in parsed.origins else origin)


def _check_settings(begun: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    # Compared as they are written: a tuple and a list are one setting.
    differing = sorted(
        name
        for name in begun.keys() | settings.keys()
        if name not in begun or name not in settings or dumps(begun[name]) != dumps(settings[name])
    )
    if differing:
        raise UsageError(
            f"{path} was begun with another " + ", ".join(differing),
            wanted=", ".join(f"{name} {begun.get(name)!r}" for name in differing),
            do="repeat the settings of that run, or choose another --run-name",
        )


def read_run(folder: Path, experiment: str) -> RunRecords:
    """Read what an experiment of a run measured so far, while it runs too.

    Raises:
        DataError: There is no such file, or it is malformed; the message names the line.
    """
    path = _path(folder, experiment)
    existing = path if path.exists() else _partial(path)
    lines = [raw for _, raw in read_lines(existing)]
    if existing != path and lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # the writer has not finished this one
    return _parsed(lines, existing, experiment)


def _parsed(lines: list[bytes], path: Path, experiment: str) -> RunRecords:
    """Take header, origins and cells apart."""
    rows = [loads(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    header = rows[0] if rows else {}
    named = (header.get("kind"), header.get("schema"), header.get("experiment")) == (
        KIND,
        SCHEMA,
        experiment,
    )
    if not named or not all(isinstance(header.get(name), dict) for name in ("settings", "origin")):
        raise DataError(
            f"{path} does not begin like a run of {experiment}",
            wanted=f"a header of kind {KIND}, schema {SCHEMA}, with settings and origin",
            do="choose another --run-name, or move the file away",
        )
    for number, row in enumerate(rows[1:], 2):
        is_origin = "key" not in row and isinstance(row.get("origin"), dict)
        if not (is_origin or isinstance(row.get("key"), str)):
            raise DataError(
                f"{path}, line {number}: neither a cell with a key nor an origin",
                wanted="lines that a run wrote",
                do="remove the line, or move the file away",
            )
    origins = (header["origin"], *(row["origin"] for row in rows[1:] if "key" not in row))
    cells = tuple(row for row in rows[1:] if "key" in row)
    if len({cell["key"] for cell in cells}) < len(cells):
        raise DataError(
            f"{path} has a cell twice", wanted="every cell once", do="remove one of the two lines"
        )
    return RunRecords(experiment, header["settings"], origins, cells, path.suffix != ".partial")


def _path(folder: Path, experiment: str) -> Path:
    return folder / f"{experiment}.jsonl"


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
