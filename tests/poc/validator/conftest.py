"""A validator on the small model, and honest and lying nodes that send to it."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from assay.poc import Proof, Round, get_pipeline, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.records import describe_packing, pack_record
from assay.poc.service import ServiceSettings
from assay.poc.validator import ValidatorSettings, create_app
from assay.poc.validator.recomputer import Budget
from assay.poc.validator.validator_controller import ValidatorController
from tests.poc.service.conftest import TestClient, signed
from tests.waiting import until

API = "/api/v1/validator"
BLOCK = "block_alpha"
HEIGHT = 7
SEQ_LEN = 8
BATCH = 8
R_TARGET = 1.416
KEYS = ("node_A", "node_B", "node_C")
NODE_COUNT = 3


def secret_of(name: str) -> str:
    return "whsec_" + base64.b64encode(hashlib.sha256(name.encode()).digest()).decode()


def pins_text(
    model: Any, *, preset: str = "poc-2.0", keys: Sequence[str] = KEYS, **changes: Any
) -> str:
    """The pins of a network on a model: node i of three has every third nonce."""
    pipeline = get_pipeline(preset)
    vectors = pipeline.output != "distance"
    round = {
        "preset": preset,
        "seq_len": SEQ_LEN,
        "strength": 256 if pipeline.texts == "versioned" else 32,
    }
    round |= (
        {"node_count": NODE_COUNT, "fewest_nonces": 8}
        | ({} if vectors else {"r_target": R_TARGET})
        | changes
    )
    build = dict.fromkeys(
        ("device", "attention", "batch_size", "threads", "torch", "library", "kernels"), "*"
    )
    lines = [
        "schema = 1",
        "[round]",
        *(f"{name} = {json.dumps(value)}" for name, value in round.items()),
    ]
    for i, key in enumerate(keys):
        lines += ["[[nodes]]", f"public_key = {json.dumps(key)}", f"node_id = {i % NODE_COUNT}"]
    lines += [
        "[[models]]",
        f"reference = {json.dumps(str(model.reference))}",
        f'digest = "{model.digest}"',
    ]
    lines += ["[[models.builds]]", 'name = "cpu"', 'engine = "hf"', 'dtype = "float32"']
    lines += [f"{name} = {json.dumps(value)}" for name, value in build.items()]
    return "\n".join(lines) + "\n"


def nodes_text(keys: Sequence[str] = KEYS) -> str:
    tables = (
        f"[[nodes]]\npublic_key = {json.dumps(key)}\nsecrets = [{json.dumps(secret_of(key))}]\n"
        for key in keys
    )
    return "".join(tables)


def proof_of(
    model: Any, key: str, places: range = range(40), *, block: str = BLOCK, **changes: Any
) -> Proof:
    """An honest proof of a node."""
    node_id = KEYS.index(key) if key in KEYS else 0
    values = {
        "block_hash": block,
        "block_height": HEIGHT,
        "public_key": key,
        "seq_len": SEQ_LEN,
        "r_target": R_TARGET,
    }
    round = Round(**(values | {"node_id": node_id, "node_count": NODE_COUNT} | changes))
    return prove(model, round, round.nonces(places.start, places.stop), batch_size=BATCH)


def body_of(proof: Proof, **changes: Any) -> dict[str, Any]:
    """The callback that a service sends for a proof's valid nonces."""
    round = proof.round
    body: dict[str, Any] = {
        name: getattr(round, name)
        for name in ("public_key", "block_hash", "block_height", "node_id")
    }
    if proof.header.pipeline.output != "distance":
        packed = {
            record.nonce: base64.b64encode(pack_record(record)).decode() for record in proof.records
        }
        body["artifacts"] = [{"nonce": nonce, "vector_b64": text} for nonce, text in packed.items()]
        body["encoding"] = describe_packing(proof.header.pipeline)
    else:
        valid = [record for record in proof.records if proof.header.is_valid(record)]
        body |= {
            "nonces": [r.nonce for r in valid],
            "dist": [r.distance for r in valid],
            "r_target": round.r_target,
        }
    return body | changes


BLOCKS = {BLOCK: HEIGHT, "block_beta": HEIGHT + 1}
"""No block convicts alone, and fewer than 128 nonces may hide a fault of the place: liars lie in
both of these.
"""


class Running:
    """A validator with a client, which can be closed and started again on the same data."""

    def __init__(
        self, model: Any, directory: Path, settings: dict[str, Any], service: dict[str, Any]
    ) -> None:
        self.model = model
        self.directory = directory
        self.settings = {
            "pins": directory / "pins.toml",
            "nodes": directory / "nodes.toml",
            "batch_size": BATCH,
            **settings,
        }
        self.service = {"data_dir": directory / "data", **service}
        self.signed = False  # whether others reach the port
        self.ids = 0
        self.load = lambda: Deployment.of(model, compiled=False)
        self.start()

    def start(self) -> None:
        self.controller = ValidatorController(
            self.load,
            ValidatorSettings(**self.settings),
            ServiceSettings(**self.service),
            signed=self.signed,
        )
        keys = self.service.get("api_keys", ())
        self.headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        self.client = TestClient(create_app(self.controller), base_url="http://127.0.0.1")
        self.client.__enter__()

    def close(self) -> None:
        self.client.__exit__(None, None, None)

    def restart(self) -> None:
        self.close()
        self.start()

    def wait_ready(self) -> None:
        until(lambda: self.client.get("/ready").status_code == 200)

    def announce(self, block: str = BLOCK, height: int = HEIGHT) -> None:
        body = {"block_hash": block, "block_height": height}
        answer = self.client.post(f"{API}/blocks", json=body, headers=self.headers)
        assert answer.status_code == 200, answer.text

    def send(
        self,
        body: Any,
        *,
        key: str | None = None,
        id: str | None = None,
        path: str = "generated",
        status: int = 200,
    ) -> dict[str, Any]:
        """Post a message that the node's own secret signed; the answer must have the status."""
        text = body if isinstance(body, str) else json.dumps(body)
        key = key or body["public_key"]
        self.ids += 1
        headers = signed(secret_of(key), text, id or f"msg_{self.ids}") | {
            "content-type": "application/json"
        }
        answer = self.client.post(f"{API}/{path}", content=text.encode(), headers=headers)
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json()

    def send_lies(
        self, key: str, change: Callable[[dict], dict], places: range = range(130), **round: Any
    ) -> None:
        """Send the callbacks of proofs in two blocks, each after a change."""
        for block, height in BLOCKS.items():
            self.announce(block, height)
            self.send(
                change(
                    body_of(
                        proof_of(self.model, key, places, block=block, block_height=height, **round)
                    )
                )
            )

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        answer = self.client.get(API + path, params=query)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()

    def node(self, key: str) -> dict[str, Any]:
        return next(
            node for node in self.get("/nodes", limit=1000)["nodes"] if node["public_key"] == key
        )

    def verdict(self, key: str) -> str:
        return self.node(key)["verdict"]


@pytest.fixture
def validating(small_model, tmp_path: Path) -> Callable[..., Any]:
    """A context manager that runs a validator of some pins, with some settings."""

    @contextmanager
    def run(
        *, preset: str = "poc-2.0", pins: str | None = None, service: dict | None = None, **settings
    ) -> Iterator[Running]:
        (tmp_path / "pins.toml").write_text(pins or pins_text(small_model, preset=preset))
        (tmp_path / "nodes.toml").write_text(nodes_text())
        running = Running(
            small_model, tmp_path, {"nonces_per_hour": 10_000_000, **settings}, service or {}
        )
        try:
            running.announce() if "block_hash" not in (pins or "") else None
            yield running
        finally:
            running.close()

    return run


@pytest.fixture
def stopped(validating, small_model, monkeypatch):
    """A validator with one message, whose worker a test runs by hand."""
    load_model = ValidatorController.load_model

    def load_alone(controller: ValidatorController, load: Callable[[], Deployment]) -> None:
        load_model(controller, load)  # without its result the thread of the worker ends

    monkeypatch.setattr(ValidatorController, "load_model", load_alone)
    monkeypatch.setattr(Budget, "left", lambda self: 1000)
    with validating(sample=16) as running:
        running.send(body_of(proof_of(small_model, "node_A", range(60))), id="m1")
        until(lambda: running.controller.deployment)
        yield running
