"""Audits of honest responses that servers of several settings served, judged by the stated defaults."""

import asyncio

import numpy as np
from _vllm_answers import BLOCK, NODE, mixed, prompts_of, receipts_of, send_all
from _vllm_tokens import by_setting
from responses import AUDITS, RESPONSES, TOKENS, Half, first

from assay.models import load_model
from assay.poc.responses import Receipts, replay, respond
from assay.poc.responses.calibration import default_response_noise
from assay.poc.verdict.response_noise import ResponseTest


def audits(arguments, folder):
    """Return how many audits of honest responses are accused, by setting and by dtype of the verifier."""

    def prepare():
        models = {dtype: load_model(arguments.model, dtype=dtype) for dtype in ("float32", "bfloat16")}
        requests = mixed(arguments.requests, models["float32"].tokenizer, tokens=(TOKENS, TOKENS))
        stated = models[arguments.dtype]
        return models, requests, respond(stated, requests[:1], block_hash=BLOCK, public_key=NODE).header

    def measure(server, models, requests, header):
        answers = asyncio.run(send_all(server.url, requests, ignore_eos=True))
        assert {one["status"] for one in answers} == {200}, answers
        found = [receipts_of(server, request.request_id)[0] for request in requests]
        rows = []
        for dtype, model in models.items():
            replays = replay(Receipts.build(header, found, 0.0), model, prompts=prompts_of(requests))
            test = ResponseTest(default_response_noise(arguments.dtype, dtype))
            logs = Half(replays, test).audits(AUDITS, RESPONSES, 0)
            row = {"verifier": dtype, "match": sum(one.matches for one in replays) / (TOKENS * len(replays))}
            row |= {"accused": {name: float(np.mean(np.isfinite(first(each)))) for name, each in logs.items()}}
            rows.append(row | {"largest_log_e": {name: float(each.max()) for name, each in logs.items()}})
        return rows

    figures = by_setting(arguments, folder, prepare, measure)
    return {"requests": arguments.requests, "audits": AUDITS, "tokens": RESPONSES * TOKENS, "settings": figures}
