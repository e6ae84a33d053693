"""The matrix: models × modes × blocks × keys against live services over HTTP, as the published
tests were run.

Every configuration (a model in a mode) has a service of its own, started for it and ended after it.
A test is one round: it is begun over HTTP, generates for a while, is stopped, and is over when the
receiver has every valid nonce.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx
import numpy as np
import torch
from pydantic import Field

from assay import stats
from assay.errors import ResourceError
from assay.files.jsonl import JsonObject
from assay.files.storage import write_atomic, write_jsonl
from assay.models.catalogue import model_info
from assay.models.load import load_model
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.blocks import has_block_factor
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.round import Round
from assay.settings import Names
from assay.stats.chord import RANDOM_HEAD_ROWS
from assay_research.runs.report import Column, Section, Table, table_of
from assay_research.runs.runs import (
    BLOCKS,
    Blocks,
    Dtype,
    ExperimentPlan,
    Note,
    Progress,
    RunRecords,
    open_run,
)
from assay_research.runs.spread import Spread, spread_of
from assay_research.runs.states import effective_dimension, published, state_pipeline

MODES = {"sign-flips": "poc-2.0", "layer-hooks": "layer-normalize"}
"""Mode, as the published tables call it → preset."""

WARM_UP = "warm-up"  # block and key of the round that compiles kernels before anything is timed
_STATES = 256  # nonces from which the effective dimension is measured
_FIRST_BATCH_SECONDS = 600.0
_DELIVERY_SECONDS = 60.0
_START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_POLL = 0.02
PUBLISHED_LIMIT = 0.05
"""The published tests call a spread below this a success."""
PUBLISHED = {
    ("qwen", "sign-flips"): ((57.7, 58.5, 58.0), (59.7, 58.1, 58.9), (58.9, 59.7, 58.9)),
    ("llama", "sign-flips"): ((57.5, 58.3, 58.4), (58.8, 57.3, 58.1), (58.7, 59.5, 58.8)),
    ("qwen", "layer-hooks"): ((60.2, 60.0, 58.9), (63.3, 64.9, 62.6), (60.0, 60.4, 59.7)),
    ("llama", "layer-hooks"): ((62.5, 62.7, 62.4), (64.4, 64.7, 65.3), (55.5, 54.2, 53.9)),
}
"""Published valid rates in percent, per block (alpha, beta, gamma) and key (A, B, C), at 1.416 and
40 seconds.
"""
THROUGHPUT: dict[str, Column] = {
    "model": "model",
    "mode": "mode",
    "nonces": "nonces",
    "nonces/s": "{nonces_per_second:.1f}",
    "sd over tests": lambda row: (
        row["nonces_per_second_error"] and f"{row['nonces_per_second_error']:.1f}"
    ),
    "valid, not delivered": "undelivered",
}


class Live:
    """A command of assay, such as ``poc serve``, on a free port of this machine until the ``with``
    block ends.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self._start = self.log_size()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "assay", *arguments, "--port", "0", "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self._client: httpx.Client | None = None
        self.url = ""

    def connect(self, ready: str = "/health") -> None:
        """Wait until the process serves and the page ``ready`` answers 200; the error has the end
        of its log.
        """
        if self._client is not None:
            return
        wait_until(lambda: self._port() is not None, _START_SECONDS, self.failure)
        self.url = f"http://127.0.0.1:{self._port()}"
        self._client = client = httpx.Client(base_url=self.url, timeout=60.0)
        wait_until(lambda: self._answers(client, ready), _START_SECONDS, self.failure)

    def get(self, path: str, **query: Any) -> Any:
        """Return what a page answers."""
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Post an object and return the answer."""
        return self._call("POST", path, json=body or {})

    def log_size(self) -> int:
        """Return the bytes of the log so far."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_since(self, offset: int) -> bytes:
        """Return what was logged after so many bytes."""
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read()

    def failure(self, seen: str) -> ResourceError:
        """Return the error for something that was seen, with the end of the log."""
        tail = self.log_since(self._start).decode(errors="replace").strip()[-1500:]
        return ResourceError(
            f"{self.log.name}: {seen}",
            wanted="a live service",
            do=f"see the log, which ends with:\n{tail}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """Return what the service answers; anything but 200 is a ResourceError."""
        assert self._client is not None, "nobody calls what is not connected"
        try:
            answer = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self.failure(f"{method} {path}: {type(error).__name__}") from error
        if answer.status_code != httpx.codes.OK:
            raise self.failure(
                f"{method} {path} answered {answer.status_code}: {answer.text[:500]}"
            )
        return answer.json()

    def _answers(self, client: httpx.Client, path: str) -> bool:
        self._check_alive()
        try:
            return client.get(path).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _port(self) -> int | None:
        """Return the port that the log names."""
        self._check_alive()
        for line in self.log_since(self._start).splitlines():
            if b'"serving"' in line:
                return int(json.loads(line)["port"])
        return None

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise self.failure(f"the process ended with code {self._process.returncode}")


def wait_until(true: Callable[[], Any], seconds: float, failed: Callable[[str], Exception]) -> None:
    """Ask again and again until something is true; raise what ``failed`` makes of a sentence after
    so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise failed(f"not done after {seconds:.0f} seconds")
        time.sleep(_POLL)


@dataclass(frozen=True)
class Test:
    """One cell of the matrix."""

    number: int
    model: str
    mode: str
    block: str
    public_key: str

    @property
    def key(self) -> str:
        """Key of its cell."""
        return f"{self.model} {self.mode} {self.block} {self.public_key}"

    @property
    def log_name(self) -> str:
        """First part of the names of its logs."""
        parts = (self.model, self.mode, self.block, self.public_key)
        clean = [
            "".join(c if c.isalnum() or c in "-_." else "-" for c in part.rpartition("/")[2])
            for part in parts
        ]
        return f"test_{self.number:02d}_" + "_".join(clean)


class MatrixPlan(ExperimentPlan):
    """Which tests are wanted, and how they are run.

    Raises:
        UsageError: A list is empty or names something twice, a mode is unknown, or a number is out
            of range.
    """

    modes: Names = Field(tuple(MODES), description="Modes of the rounds, separated by commas.")
    blocks: Blocks = BLOCKS
    public_keys: Names = Field(
        ("node_A", "node_B", "node_C"), description="Keys of nodes, separated by commas."
    )
    duration: float = Field(
        40.0, gt=0, lt=86400, description="Seconds for which every test generates."
    )
    r_target: float = Field(1.416, description="Distance below which a nonce is valid.")
    dtype: Dtype = None

    experiment = "matrix"
    known: ClassVar[Mapping[str, Sequence[str]]] = {"modes": tuple(MODES)}
    choosing: ClassVar[frozenset[str]] = frozenset(
        {"models", "modes", "blocks", "public_keys", "duration"}
    )

    def model_post_init(self, context: Any, /) -> None:
        """Check the lists and every round."""
        super().model_post_init(context)
        for block, key in product(self.blocks, self.public_keys):
            Round(block_hash=block, public_key=key, r_target=self.r_target, seq_len=self.seq_len)

    def tests(self) -> Iterator[Test]:
        """Yield the tests in the order of their numbers."""
        cells = product(self.models, self.modes, self.blocks, self.public_keys)
        return (Test(number, *cell) for number, cell in enumerate(cells, 1))

    def measure(
        self, folder: Path, *, progress: Progress | None = None, note: Note | None = None
    ) -> None:
        """Run the tests that the run's folder does not have yet, and append their results to
        ``matrix.jsonl``.

        Logs go to ``logs/``: per test what the service wrote and which callbacks arrived. A
        sentence comes before every start of a service, and after every test.

        Raises:
            UsageError: The run was begun with other settings.
            ResourceError: A service did not start, or did not answer.
        """
        say = note or (lambda _: None)
        with open_run(folder, self.experiment, self.settings) as run, ExitStack() as stack:
            tests = list(self.tests())
            todo = [test for test in tests if test.key not in run.done]
            if not todo:
                return
            for reference in self.models:
                model_info(reference)  # an unknown model ends the run before any service starts
            logs = folder / "logs"
            logs.mkdir(exist_ok=True)
            temporary = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="assay-matrix-"))
            )
            receive = ["poc", "receive", "-o", str(temporary / "received.sqlite3")]
            receiver = stack.enter_context(Live(receive, logs / "receiver.log"))
            finished = len(tests) - len(todo)
            for (model, mode), chosen in groupby(todo, lambda test: (test.model, test.mode)):
                effective = measure_effective_dimension(self, model, mode)
                torch.cuda.empty_cache()  # the service needs the room
                say(f"starting a service for {model}, {mode}")
                with _service(
                    self, model, temporary / f"{finished}", logs / "server.log"
                ) as server:
                    receiver.connect()
                    server.connect("/ready")
                    _begin(server, self, mode, WARM_UP, WARM_UP, None)
                    server.post("/api/v1/pow/phase/validate")
                    for test in chosen:
                        values = _run_test(test, self, server, receiver, logs) | {
                            "effective_dimension": effective
                        }
                        say(
                            f"test {test.number:2d}: {model} {mode} {test.block} "
                            f"{test.public_key}: "
                            f"{values['valid']}/{values['checked']} valid, "
                            f"{values['nonces_per_second']:.1f} nonces/s"
                        )
                        run.append(test.key, values)
                        finished += 1
                        if progress:
                            progress(finished, len(tests))


def measure_effective_dimension(plan: MatrixPlan, model: str, mode: str) -> float | None:
    """Measure how many coordinates the states in front of the random head use, with a model that is
    dropped again.

    Returns None for a mode without signs: there a block moves the mean of its distances too, which
    is what the matrix shows, so blocks are held against what random directions would do.
    """
    pipeline = get_pipeline(MODES[mode])
    if not has_block_factor(pipeline):
        return None
    loaded = load_model(model, dtype=plan.dtype, device=plan.device)
    engine = HFEngine(loaded, batch_size=min(plan.batch_size, _STATES), seq_len=plan.seq_len)
    round = Round(
        block_hash=plan.blocks[0], public_key="states", seq_len=plan.seq_len, preset=pipeline.name
    )
    (states_ND,) = published(engine, round, [state_pipeline(pipeline)], range(_STATES)).values()
    return effective_dimension(states_ND)


def _service(plan: MatrixPlan, model: str, data: Path, log: Path) -> Live:
    arguments = [
        "poc",
        "serve",
        "--model",
        model,
        "--data-dir",
        str(data),
        "--allow-private-callbacks",
    ]
    settings = data.with_suffix(".toml")
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("[poc.serve]\ncallback_interval = 0.5\n", encoding="utf-8")
    arguments += ["--config", str(settings)]
    for flag, value in (("--dtype", plan.dtype), ("--device", plan.device)):
        arguments += [flag, value] if value else []
    return Live(arguments, log)


def _begin(
    server: Live, plan: MatrixPlan, mode: str, block: str, public_key: str, callback_url: str | None
) -> None:
    body = {
        "block_hash": block,
        "block_height": 1,
        "public_key": public_key,
        "r_target": plan.r_target,
        "node_id": 0,
        "node_count": 1,
        "batch_size": plan.batch_size,
        "seq_len": plan.seq_len,
        "use_layer_hooks": mode == "layer-hooks",
        "use_sign_flips": mode == "sign-flips",
    }
    server.post(
        "/api/v1/pow/init/generate", body | ({"callback_url": callback_url} if callback_url else {})
    )
    wait_until(lambda: _status(server)["total_checked"], _FIRST_BATCH_SECONDS, server.failure)


def _status(server: Live) -> Any:
    status = server.get("/api/v1/pow/status")
    if status["error"]:
        raise server.failure(f"the round ended: {status['error']}")
    return status


def _run_test(test: Test, plan: MatrixPlan, server: Live, receiver: Live, logs: Path) -> JsonObject:
    offset = server.log_size()
    seen = _last_callback(receiver)
    started = time.monotonic()
    _begin(server, plan, test.mode, test.block, test.public_key, receiver.url)
    time.sleep(max(0.0, started + plan.duration - time.monotonic()))
    server.post("/api/v1/pow/phase/validate")
    seconds = time.monotonic() - started
    final = _status(server)
    arrived = _callbacks(receiver, seen, test, expected=final["total_valid"])
    # A snapshot is made every second, or later on a busy machine.
    wait_until(
        lambda: server.get("/api/v1/pow/snapshot")["model"], _FIRST_BATCH_SECONDS, server.failure
    )
    deployed = server.get("/api/v1/pow/snapshot")["model"]
    write_atomic(logs / f"{test.log_name}_server.log", server.log_since(offset))
    write_jsonl(logs / f"{test.log_name}_callback.log", arrived)
    return {
        "test": test.number,
        "model": test.model,
        "mode": test.mode,
        "block_hash": test.block,
        "public_key": test.public_key,
        "r_target": plan.r_target,
        "checked": final["total_checked"],
        "valid": final["total_valid"],
        "valid_rate": final["total_valid"] / final["total_checked"],
        "nonces_per_second": final["rate_per_second"],
        "seconds": seconds,
        "callbacks": len(arrived),
        "callback_nonces": sum(row["nonces"] for row in arrived),
        "dtype": deployed["dtype"],
        "hidden_size": model_info(test.model).hidden_size,
    }


def _last_callback(receiver: Live) -> int:
    """Return the sequence number of the latest callback that the receiver has."""
    seen = 0
    while batches := receiver.get("/batches", after=seen, limit=10_000)["batches"]:
        seen = batches[-1]["seq"]
    return int(seen)


def _callbacks(receiver: Live, seen: int, test: Test, expected: int) -> list[JsonObject]:
    """Wait for the valid nonces of a test, and return one row per callback; fewer of them after a
    minute.

    A callback of another round is not counted: sums over all that ever arrived prove nothing about
    this test.
    """
    mine: list[JsonObject] = []

    def complete() -> bool:
        nonlocal seen
        for row in receiver.get("/batches", after=seen, limit=1000)["batches"]:
            seen = row["seq"]
            body = row["body"]
            if (body.get("block_hash"), body.get("public_key")) == (test.block, test.public_key):
                mine.append(
                    {name: row[name] for name in ("seq", "id", "kind", "at", "nonces", "copies")}
                )
        return bool(sum(row["nonces"] for row in mine) >= expected)

    deadline = time.monotonic() + _DELIVERY_SECONDS
    while not complete() and time.monotonic() < deadline:
        time.sleep(0.05)
    return mine


# The matrix as tables and on the page of a run: valid rates, the spread of the blocks, and the band
# of its noise.


def configurations(
    cells: Sequence[JsonObject], widths: Mapping[tuple[str, str], float] | None = None
) -> list[JsonObject]:
    """Sum up the cells of a matrix by model and mode, in the order of measurement.

    The spread of the valid rates of the blocks has the band of its noise, which is wider the fewer
    coordinates the states use: ``width``, the hidden size where it was not measured, for random
    directions. ``expected`` is the valid rate by the chord law.

    Args:
        cells: Cells of a run.
        widths: Effective dimensions by model and mode, for runs that did not measure them.
    """
    names = list(dict.fromkeys((cell["model"], cell["mode"]) for cell in cells))
    known_widths = widths or {}
    return [
        _configuration(
            [c for c in cells if (c["model"], c["mode"]) == name], known_widths.get(name)
        )
        for name in names
    ]


def _configuration(cells: Sequence[JsonObject], known_width: float | None) -> JsonObject:
    blocks = {}
    valid = []
    for block in sorted({cell["block_hash"] for cell in cells}):
        chosen = sorted(
            (c for c in cells if c["block_hash"] == block), key=lambda cell: str(cell["public_key"])
        )
        valid.append(sum(c["valid"] for c in chosen))
        checked = sum(c["checked"] for c in chosen)
        rates = {cell["public_key"]: cell["valid_rate"] for cell in chosen}
        blocks[block] = {"rate": valid[-1] / checked, "checked": checked, **rates}
    width = float(cells[0].get("effective_dimension") or known_width or cells[0]["hidden_size"])
    checked = [row["checked"] for row in blocks.values()]
    spread = spread_of(valid, checked, width=width) if len(blocks) > 1 else None
    speeds = np.array([cell["nonces_per_second"] for cell in cells])
    return {
        "model": cells[0]["model"],
        "mode": cells[0]["mode"],
        "blocks": blocks,
        "expected": stats.valid_rate(cells[0]["r_target"], RANDOM_HEAD_ROWS),
        "spread": spread and spread.value,
        "noise_band": spread and [spread.low, spread.high],
        "noise_band_of_nonces_alone": spread and spread.nonces_high,
        "p_value": spread and spread.p_value,
        "verdict": _verdict(spread),
        "nonces": sum(checked),
        "nonces_per_second": float(speeds.mean()),
        "nonces_per_second_error": float(speeds.std(ddof=1)) if len(speeds) > 1 else None,
        "undelivered": sum(cell["valid"] - cell["callback_nonces"] for cell in cells),
        "width": width,
    }


def _verdict(spread: Spread | None) -> str:
    """Say whether the spread is inside its noise, beyond it, or beyond the published limit too."""
    if spread is None:
        return "one block"
    if spread.inside:
        return "inside noise"
    return "beyond noise" if spread.value < PUBLISHED_LIMIT else f"over {PUBLISHED_LIMIT:.0%}"


def p_text(p_value: float) -> str:
    """Return a p-value for a table; below 1e-6 the law of the range cannot be evaluated precisely
    enough.
    """
    return f"{p_value:.2g}" if p_value >= 1e-6 else "< 1e-6"


def rate_table(configuration: JsonObject) -> Table:
    """Return valid rates per block and key."""
    rows = [{"block": block, **values} for block, values in configuration["blocks"].items()]
    columns: dict[str, Column] = {"block": "block"}
    for key in list(rows[0])[3:]:
        columns[key] = lambda row, key=key: f"{row[key]:.2%}" if key in row else None  # type: ignore[misc]
    return table_of(rows, columns | {"all keys": "{rate:.2%}", "nonces": "checked"})


def _of_spread(form: str) -> Column:
    return lambda row: "" if row["spread"] is None else form.format(**row)


SPREADS: dict[str, Column] = {
    "model": "model",
    "mode": "mode",
    "spread": _of_spread("{spread:.2%}"),
    "95 % noise band": _of_spread("{noise_band[0]:.2%} to {noise_band[1]:.2%}"),
    "p-value": lambda row: "" if row["spread"] is None else p_text(row["p_value"]),
    "published spread": lambda row: _published_spread(row),
    "verdict": "verdict",
}


def _published_spread(row: JsonObject) -> str:
    rates = next(
        (
            r
            for (name, mode), r in PUBLISHED.items()
            if name in row["model"] and mode == row["mode"]
        ),
        None,
    )
    if rates is None:
        return ""
    means = [sum(block) / len(block) for block in rates]
    return f"{max(means) - min(means):.1f} %"


def section(run: RunRecords) -> Section:
    """Return the valid rates of every configuration, the spreads with their noise bands, and the
    throughput.
    """
    summary = configurations(run.cells)
    tables = {
        f"{row['model']}, {row['mode']}: valid rate per key": rate_table(row) for row in summary
    }
    tables["Largest minus smallest valid rate of the blocks"] = table_of(summary, SPREADS)
    tables["Throughput of live services"] = table_of(summary, THROUGHPUT)
    about = (
        f"{len(run.cells)} tests, each a round of a live service over HTTP whose callbacks were "
        f"counted. The noise "
        "band is where the spread falls when nothing differs but the nonces and the random head "
        "of every block, "
        "which widens or narrows all distances of the block, the more the fewer coordinates the "
        "states use. The "
        f"published limit of success is {PUBLISHED_LIMIT:.0%}; the published spreads come from "
        f"other models, so they "
        "compare in kind, not in size."
    )
    heading = "Live services: how far apart are the valid rates of the blocks?"
    return Section(heading, about, tables, values={"configurations": summary})
