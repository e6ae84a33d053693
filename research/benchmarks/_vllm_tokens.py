"""Servers of several settings side by side, and how many of their answers have the tokens of transformers."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
from _common import note
from _vllm import Server
from _vllm_answers import BLOCK, NODE, SEEDED, begin, mixed, of_device, prompts_of, receipts_of, send_all

from assay.models import load_model
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.responses import Receipts, replay, respond

DRAFTS = "--speculative-config"
SETTINGS = {  # environment, options
    "default": ({}, {}),
    "v1": ({"VLLM_USE_V2_MODEL_RUNNER": "0"}, {}),
    "ngram": ({}, {DRAFTS: '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}'}),
    "draft": (
        {},
        {
            DRAFTS: '{"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 3}',
            # vLLM 0.32 profiles with a token kept back for every sequence: 1024 of them leave none of 1024.
            "--max-num-seqs": "64",
        },
    ),
}


def agreement(server, model, requests, wanted=None):
    """Return how many receipts of a server have the tokens and the sketches that transformers give."""
    wanted = wanted or respond(model, requests, block_hash=BLOCK, public_key=NODE)
    answers = asyncio.run(send_all(server.url, requests))
    odd = [one for one in answers if one["status"] != 200]
    assert not odd, odd
    found = [receipts_of(server, request.request_id)[0] for request in requests]
    same = [ours.output == theirs.output for ours, theirs in zip(found, wanted.receipts, strict=True)]
    distances = [
        float(abs(ours.sketches.astype(float) - theirs.sketches.astype(float)).max())
        for ours, theirs, equal in zip(found, wanted.receipts, same, strict=True)
        if equal
    ]
    replays = replay(Receipts.build(wanted.header, found, 0.0), model, prompts=prompts_of(requests))
    return {
        "requests": len(requests),
        "same_tokens": sum(same),
        "tokens": sum(len(receipt.output) for receipt in found),
        "match_on_replay": sum(one.matches for one in replays) / sum(len(one.margins) for one in replays),
        "largest_difference_of_sketches": max(distances, default=0.0),
        "different": [request.request_id for request, equal in zip(requests, same, strict=True) if not equal][:5],
    }


@contextmanager
def running(arguments, folder):
    """Start a server of each setting side by side; give them by name, each as a function that waits for it."""
    draft = folder / "draft"
    shutil.copytree(arguments.model, draft)
    with ExitStack() as ending, ThreadPoolExecutor() as pool:
        servers, starting = {}, {}
        for name in arguments.settings:
            environment, more = SETTINGS[name]
            options = {"--model": arguments.model, "--dtype": arguments.dtype} | of_device(arguments)
            options |= {option: value.replace("DRAFT", str(draft)) for option, value in more.items()}
            servers[name] = Server(folder / name, environment=SEEDED | environment, options=options)
            ending.callback(servers[name].stop)
            starting[name] = pool.submit(servers[name].start)
        yield servers, starting


def by_setting(arguments, folder, prepare, measure):
    """Return what a measurement gives for every setting, or why it failed."""
    figures = {}
    with running(arguments, folder) as (servers, starting):
        prepared = prepare()
        for name, server in servers.items():
            try:
                starting[name].result()
                begin(server)
                figures[name] = measure(server, *prepared)
            except (AssertionError, RuntimeError, httpx.HTTPError) as error:
                figures[name] = {"failed": str(error)[:1000], "log": failures(server)}
            note(f"{name}: {json.dumps(figures[name])}")
    return figures


def failures(server):
    """Return the first lines of a server's log that speak of an error."""
    lines = server.log.read_text(errors="replace").splitlines() if server.log.exists() else []
    return [line[-300:] for line in lines if "Error" in line or "error:" in line][:8]


def tokens(arguments, folder):
    """Return how far servers of all settings agree with transformers."""

    def prepare():
        model = load_model(arguments.model, dtype=arguments.dtype)
        requests = mixed(arguments.requests, model.tokenizer, drafts={"ngram", "draft"} & set(arguments.settings))
        return model, requests, respond(model, requests, block_hash=BLOCK, public_key=NODE)

    figures = by_setting(arguments, folder, prepare, agreement)
    return {"requests": arguments.requests, "sketch_every": SKETCH_EVERY, "settings": figures}
