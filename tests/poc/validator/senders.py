"""A validator in a process of its own, and a network of many nodes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assay.poc.one_machine import calibrate_model
from tests.end_to_end.server import Server
from tests.poc.validator.conftest import API, BLOCK, HEIGHT, SEQ_LEN, nodes_text, pins_text


class ValidatorServer(Server):
    """A real ``assay poc validator`` in a process of its own."""

    def __init__(
        self, directory: Path, *arguments: str, model: str | Path, fork: bool = True
    ) -> None:
        super().__init__(directory, model=model, fork=fork)
        pins = directory / "pins.toml"
        nodes = directory / "nodes.toml"
        self.arguments = [
            *(
                "poc",
                "validator",
                "--model",
                str(model),
                "--port",
                str(self.port),
                "--data-dir",
                str(self.data_dir),
            ),
            *(
                "--pins",
                str(pins),
                "--nodes",
                str(nodes),
                "--calibration",
                str(directory / "calibration.json"),
            ),
            *("--log-format", "json", *arguments),
        ]

    def announce(self, block: str = BLOCK, height: int = HEIGHT) -> None:
        status, answer = self.call(
            "POST", f"{API}/blocks", {"block_hash": block, "block_height": height}
        )
        assert status == 200, answer


def keys_of(count: int) -> list[str]:
    return [f"node_{i:04d}" for i in range(count)]


def write_network(directory: Path, model: Any, keys: Sequence[str], **round: Any) -> None:
    """Write pins and secrets of some nodes, and a law of the model: a process has none of the
    tests' own.
    """
    shape = {"seq_len": SEQ_LEN, "blocks": 4, "nonces": 64}
    calibrate_model(
        model.reference, formats=[str(model.dtype).removeprefix("torch.")], device="cpu", **shape
    ).save(directory / "calibration.json")
    (directory / "pins.toml").write_text(pins_text(model, keys=keys, **round))
    (directory / "nodes.toml").write_text(nodes_text(keys))


def dumps(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))
