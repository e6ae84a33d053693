"""Responses that can be checked: seeded sampling, sketches, and receipts of what was served.

The noise that chooses a token follows from a seed that no server can choose alone, and is the same bits everywhere.
So one prefill of prompt and output shows, token by token, whether model and parameters are those that were agreed::

    model = assay.load_model("reference:qwen3")
    made = respond(model, ["def add(a, b):"], block_hash="…", public_key="…", sampling=Sampling(temperature=0.7))
    made.save("receipts.jsonl")

docs/responses.md has the formulas and the format.
"""

from assay.poc.responses._adapters import Adapter, Lora, digest_adapter, load_adapter
from assay.poc.responses._calibration import (
    ResponseCalibration,
    calibrate_responses,
    check_enough_tokens,
    check_one_checkpoint,
    default_response_noise,
    fit_response_noise,
)
from assay.poc.responses._files import (
    LONGEST_LINE,
    Receipts,
    Tally,
    parse_header,
    parse_receipt,
)
from assay.poc.responses._forward import CachedForward
from assay.poc.responses._gaps import Margins, measure_margins
from assay.poc.responses._judge import ResponseVerdict, judge_responses, noise_between, sampled
from assay.poc.responses._pins import Evidence, ReceiptPins, chosen_receipts
from assay.poc.responses._prefill import HFPrefill, Prefill, Prefilled, Whole
from assay.poc.responses._receipts import (
    MOST_TOKENS,
    Prompt,
    Receipt,
    ReceiptFooter,
    ReceiptHeader,
)
from assay.poc.responses._replay import Replayed, check_adapter, check_model, check_runnable, replay
from assay.poc.responses._requests import DEFAULT_MAX_TOKENS, Request, encoded, read_requests
from assay.poc.responses._respond import respond, stop_tokens
from assay.poc.responses._sampler import Sampler
from assay.poc.responses._sampling import (
    HIGHEST_TOKEN,
    RANGES,
    Sampling,
    counts_before,
    kept,
    penalised,
    scores,
    tokens_of,
)
from assay.poc.responses._seeds import HIGHEST_INDEX, ResponseSeed, step_seeds
from assay.poc.responses._sketches import sketches
from assay.poc.responses._vllm_prefill import VLLMPrefill, no_adapter

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "HIGHEST_INDEX",
    "HIGHEST_TOKEN",
    "LONGEST_LINE",
    "MOST_TOKENS",
    "RANGES",
    "Adapter",
    "CachedForward",
    "Evidence",
    "HFPrefill",
    "Lora",
    "Margins",
    "Prefill",
    "Prefilled",
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
    "Sampler",
    "Sampling",
    "Tally",
    "VLLMPrefill",
    "Whole",
    "calibrate_responses",
    "check_adapter",
    "check_enough_tokens",
    "check_model",
    "check_one_checkpoint",
    "check_runnable",
    "chosen_receipts",
    "counts_before",
    "default_response_noise",
    "digest_adapter",
    "encoded",
    "fit_response_noise",
    "judge_responses",
    "kept",
    "load_adapter",
    "measure_margins",
    "no_adapter",
    "noise_between",
    "parse_header",
    "parse_receipt",
    "penalised",
    "read_requests",
    "replay",
    "respond",
    "sampled",
    "scores",
    "sketches",
    "step_seeds",
    "stop_tokens",
    "tokens_of",
]
