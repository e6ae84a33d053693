"""Responses that can be checked: seeded sampling, sketches, and receipts of what was served.

The noise that chooses a token follows from a seed that no server can choose alone, and is the same bits everywhere.
So one prefill of prompt and output shows, token by token, whether model and parameters are those that were agreed::

    model = assay.load_model("reference:qwen3")
    made = respond(model, ["def add(a, b):"], block_hash="…", public_key="…", sampling=Sampling(temperature=0.7))
    made.save("receipts.jsonl")

docs/responses.md has the formulas and the format.
"""

from assay.poc.responses.calibration import ResponseCalibration, calibrate_responses
from assay.poc.responses.judge import ReceiptPins, ResponseVerdict, judge_responses
from assay.poc.responses.prefill import HFPrefill
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptFooter, ReceiptHeader, Receipts
from assay.poc.responses.replay import Replayed, replay
from assay.poc.responses.requests import Request, read_requests
from assay.poc.responses.respond import respond
from assay.poc.responses.sampling import ResponseSeed, Sampling

__all__ = [
    "HFPrefill",
    "Prompt",
    "Receipt",
    "ReceiptFooter",
    "ReceiptHeader",
    "ReceiptPins",
    "Receipts",
    "Replayed",
    "Request",
    "ResponseCalibration",
    "ResponseSeed",
    "ResponseVerdict",
    "Sampling",
    "calibrate_responses",
    "judge_responses",
    "read_requests",
    "replay",
    "respond",
]
