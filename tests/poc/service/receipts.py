"""Receipts that tests store."""

import asyncio
from collections.abc import Iterable

import numpy as np

from assay.poc.responses import Prompt, Receipt, ReceiptHeader, Sampling
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
