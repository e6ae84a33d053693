"""An engine that is quick and can be told to wait or fail, and a service on it."""

import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog
import torch
from standardwebhooks import Webhook

from assay.errors import StorageError
from assay.files.sqlite import Database
from assay.poc import Fingerprint, Input, Pipeline
from assay.poc.engines.hf.engine import plain_batches
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.transforms import Reading
from assay.poc.service import ServiceSettings, create_app
from assay.poc.service.service_controller import Controller
from tests.waiting import until

with warnings.catch_warnings():
    # Newer releases of starlette ask for another client than the httpx that callbacks are sent
    # with.
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

BLOCK = {"block_hash": "block_alpha", "block_height": 7, "public_key": "node_A"}
ROUND = BLOCK | {"r_target": 1.416, "node_id": 0, "node_count": 1, "batch_size": 4, "seq_len": 4}
PARAMS = {"model": "fake", "seq_len": 4, "k_dim": 12}
ARTIFACTS = BLOCK | {"node_id": 0, "node_count": 1, "batch_size": 4, "params": PARAMS}
PREFIX = "/api/v1/pow"
BUILD = {
    "engine": "fake",
    "device": "none",
    "dtype": "float32",
    "attention": "none",
    "torch": "0",
    "library": "none",
}
FINGERPRINT = Fingerprint(**BUILD, batch_size=1, seq_len=64, threads=1)
FULL = StorageError("database or disk is full", wanted="room", do="free some")


class FakeEngine:
    """The Engine protocol without a model: a hidden state is a fixed function of the nonce."""

    hidden_size = 16
    vocab_size = 32
    dtype = "float32"
    device = torch.device("cpu")
    frame = None

    def __init__(self, rig: "Rig", seq_len: int, batch_size: int) -> None:
        self.rig = rig
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.fingerprint = replace(FINGERPRINT, batch_size=batch_size, seq_len=seq_len)

    def supports(self, pipeline: Pipeline) -> bool:
        return self.rig.supports(pipeline)

    def run(self, inputs: Sequence[Input], pipeline: Pipeline, claimed_MN=None):
        return plain_batches(self, inputs, pipeline)

    def embeddings(self, inputs: Sequence[Input]) -> torch.Tensor:
        return torch.tensor([nonce for _, nonce in inputs], dtype=torch.float64)

    def read(self, nonces_B: torch.Tensor, reading: Reading | None) -> torch.Tensor:
        self.rig.batch(len(nonces_B))
        phase = nonces_B[:, None] * 0.7310585 + torch.arange(self.hidden_size, dtype=torch.float64)
        states_BD = (torch.sin(phase * 12.9898) * 43758.5453 % 1.0 - 0.5).float() * self.rig.scale
        return (
            states_BD if reading is None else states_BD + reading.weights.sum(dim=1, keepdim=True)
        )

    def trained_head(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD.repeat(1, self.vocab_size // self.hidden_size)

    def between_layers(self, step, round):
        self.rig.layers.append(step)
        return nullcontext()


class Rig:
    """What a test can do to the engine."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.fail: Exception | None = None
        self.supports: Callable[[Pipeline], bool] = lambda _: True
        self.load: Callable[[], None] = lambda: None
        self.scale = 1.0
        self.pause = 0.001
        self.batches = 0
        self.returned = 0
        self.shapes: list[tuple[int, int]] = []
        self.layers: list[str] = []

    def batch(self, rows: int) -> None:
        self.batches += 1
        self.entered.set()
        assert self.open.wait(30)
        time.sleep(self.pause)
        if self.fail is not None:
            raise self.fail
        self.returned += 1

    def deployment(self) -> Deployment:
        self.load()

        def engine(seq_len: int, batch_size: int) -> FakeEngine:
            self.shapes.append((seq_len, batch_size))
            return FakeEngine(self, seq_len, batch_size)

        return Deployment(
            reference="fake",
            digest="0" * 64,
            weights="trained",
            dtype="float32",
            max_positions=512,
            engine=engine,
        )


class Service:
    """A running service with a client, which can be closed and started again on the same data."""

    def __init__(self, rig: Rig, settings: ServiceSettings) -> None:
        self.rig = rig
        self.settings = settings
        self.start()

    def start(self) -> None:
        self.controller = Controller(self.rig.deployment, self.settings)
        self.client = TestClient(create_app(self.controller), base_url="http://127.0.0.1")
        self.client.__enter__()

    def wait_ready(self) -> None:
        until(lambda: self.client.get("/ready").status_code == 200)

    def restart(self) -> None:
        self.close()
        self.start()
        self.wait_ready()

    def close(self) -> None:
        self.client.__exit__(None, None, None)

    def post(self, path: str, body: object = None, status: int = 200):
        answer = self.client.post(PREFIX + path, json=body if body is not None else {})
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer.json()

    def generate(self, least: int, changes: dict[str, object] | None = None) -> None:
        """Begin a round, and wait until so many nonces are checked."""
        self.post("/init/generate", ROUND | (changes or {}))
        until(lambda: self.checked() >= least)

    def sql(self, statement: str, values: Sequence[object] = ()) -> list[tuple]:
        """Run a statement on the database of the service, and return its rows."""
        return execute(self.settings.data_dir / "service.sqlite3", statement, values)

    def status(self):
        return self.client.get(f"{PREFIX}/status").json()

    def checked(self) -> int:
        return self.status()["total_checked"]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.open.set()


@pytest.fixture
def serving(rig: Rig, tmp_path: Path):
    """A context manager that runs a service with some settings."""

    @contextmanager
    def run(**changes) -> Iterator[Service]:
        values = {
            "data_dir": tmp_path / "data",
            "seq_len": 4,
            "allow_private_callbacks": True,
            "callback_interval": 0.02,
            "callback_backoff": 0.02,
            "callback_backoff_max": 0.1,
            "callback_timeout": 2.0,
            "max_positions": 4096,
        }
        service = Service(rig, ServiceSettings(**(values | changes)))
        try:
            service.wait_ready()
            yield service
        finally:
            rig.open.set()
            service.close()

    return run


@pytest.fixture
def service(serving) -> Iterator[Service]:
    with serving() as running:
        yield running


@pytest.fixture
def restored_logs() -> Iterator[None]:
    """The log as it was configured, after the test."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def execute(path: Path, statement: str, values: Sequence[object] = ()) -> list[tuple]:
    """Run a statement on a file beside the service, and return its rows."""
    with closing(sqlite3.connect(path)) as database, database:
        return database.execute(statement, values).fetchall()


def signed(
    secret: str, body: str, message_id: str = "msg_1", at: datetime | None = None
) -> dict[str, str]:
    """Return the headers of a message that was signed now, or at another time."""
    at = at or datetime.now(UTC)
    stamp = str(int(at.timestamp()))
    signature = Webhook(secret).sign(message_id, at, body)
    return {"webhook-id": message_id, "webhook-timestamp": stamp, "webhook-signature": signature}


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException
) -> list[BaseException]:
    """Let a function raise an error until the returned list is cleared."""
    errors = [error]
    real = getattr(owner, name)

    def call(*arguments, **named):
        if errors:
            raise errors[0]
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, call)
    return errors


def cap(database: Database) -> list[int]:
    """Let the file grow no further until the returned limit is raised: SQLite gives the error of a
    full disk.
    """
    with database.write() as connection:
        pool = connection.engine.pool
        limit = [connection.exec_driver_sql("PRAGMA page_count").scalar_one()]

    def checkout(connection, record, proxy) -> None:
        connection.execute(f"PRAGMA max_page_count = {limit[0]}").close()

    sa.event.listen(pool, "checkout", checkout)
    return limit
