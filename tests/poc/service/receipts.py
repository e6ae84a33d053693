"""Receipts that tests store, and ways to store and read them."""

import asyncio
from collections.abc import Iterable

import numpy as np

from assay.poc.responses import Prompt, Receipt, ReceiptHeader, Receipts, Sampling
from tests.poc.service.conftest import FINGERPRINT

RECEIPTS = "/api/v1/receipts"


def header(**changes) -> ReceiptHeader:
    """Return the header of a node that serves a model."""
    values = {"public_key": "node_A", "reference": "fake", "digest": "0" * 64, "weights": "trained"}
    return ReceiptHeader(**(values | changes), fingerprint=FINGERPRINT)


def receipt(request_id: str, **changes) -> Receipt:
    """Return the receipt of a response of 40 tokens."""
    output = changes.pop("output", tuple(range(40)))
    values = {
        "request_id": request_id,
        "user_seed": "",
        "block_hash": "block_alpha",
        "prompt": Prompt.of([1, 2, 3]),
        "output": output,
        "sketches": np.full((-(-len(output) // 32), 12), 0.25, dtype=np.float16),
        "sampling": Sampling(),
    }
    return Receipt(**(values | changes))


async def stored_together(sink, receipts: Iterable[Receipt]) -> None:
    """Store receipts as the responses of concurrent requests do."""
    await asyncio.gather(*(sink.store(each) for each in receipts))


def store(service, *receipts, under=None) -> None:
    """Store receipts in a service."""
    sink = service.controller.receipts.sink(under or header())
    asyncio.run(stored_together(sink, receipts))


def get(service, path: str, status: int = 200, **params):
    """Return what a route of receipts answers, which must have this status."""
    answer = service.client.get(RECEIPTS + path, params=params)
    assert answer.status_code == status, (path, answer.status_code, answer.text[:500])
    return (
        answer.json()
        if answer.content and "jsonl" not in answer.headers["content-type"]
        else answer
    )


def on_disk(service) -> bytes:
    """Return every byte of the database and of its journal."""
    path = service.controller.database.path
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


def files(service, **params) -> list[Receipts]:
    """Fetch file after file, each of which must be complete."""
    found = []
    after = 0
    while True:
        answer = service.client.get(f"{RECEIPTS}.jsonl", params={"after": after} | params)
        assert int(answer.headers["receipts-last"]) >= after
        if answer.status_code == 204:
            return found
        assert answer.headers["content-type"].startswith("application/jsonl")
        found.append(Receipts.parse("export", answer.content))
        after = int(answer.headers["receipts-last"])
        if answer.headers["receipts-more"] == "false":
            return found
