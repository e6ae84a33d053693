"""Requests of mixed parameters, as clients send them to a vLLM server, and the receipts of what it answers."""

import asyncio
import json
import random
import time

import httpx
from _vllm import BEGINNINGS, MODEL, lines_of

from assay.files.jsonl import dumps
from assay.poc.responses import Prompt, Receipts, Request, Sampling, replay, respond
from assay.poc.responses.receipts import parse_receipt

BLOCK, NODE = "block-of-responses", "node"
SEEDED = {"ASSAY_RESPONSES": "seeded", "ASSAY_RESPONSES_PUBLIC_KEY": NODE}
ON_GPU = {"--gpu-memory-utilization": "0.15", "--kv-cache-memory-bytes": "8000000000"}  # many start at once


def mixed(count, tokenizer, *, seed=0, tokens=(1, 80), drafts=False):
    """Return requests of mixed prompts and parameters, the first of them with one parameter of each kind.

    ``drafts`` leaves out what vLLM refuses beside them.
    """
    chosen = random.Random(seed)
    kinds = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {10: 2.0, 65: -3.0}},
        {"temperature": 0.5, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.05},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    ]
    if drafts:
        kinds = [kind for kind in kinds if not {"min_p", "logit_bias"} & set(kind)]
    requests = []
    for number in range(count):
        sampling = (
            kinds[number] if number < len(kinds) else chosen.choice(kinds) | {"temperature": chosen.random() + 0.1}
        )
        text = chosen.choice(BEGINNINGS).format(number) * chosen.choice((1, 1, 4))
        requests.append(
            Request(
                prompt=tuple(tokenizer.encode(text)),
                request_id=f"mixed-{seed}-{number}",
                user_seed=str(number) if number % 3 else "",
                sampling=Sampling(**sampling),
                max_tokens=chosen.randint(*tokens),
            )
        )
    return requests


def body_of(request, **other):
    """Return the body of a completion, as any client of vLLM would send it."""
    sampling = request.sampling.as_dict()
    seed = {"seed": int(request.user_seed)} if request.user_seed else {}
    fixed = {"model": MODEL, "prompt": list(request.prompt), "max_tokens": request.max_tokens}
    return fixed | sampling | seed | other


async def send(client, request, gate, **other):
    """Send one request; return its status, text, finish reason and the times at which its pieces came."""
    async with gate:
        headers = {"X-Request-Id": request.request_id}
        body = body_of(request, **other)
        if not body.get("stream"):
            answer = await client.post("/v1/completions", json=body, headers=headers)
            choice = answer.json()["choices"][0] if answer.status_code == 200 else {"text": answer.text}
            return {"status": answer.status_code, "text": choice["text"], "times": []}
        times, text = [time.perf_counter()], []
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            async for line in lines_of(answer):
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                    piece = json.loads(line[6:])
                    if "choices" not in piece:
                        return {"status": 500, "text": line, "times": times}
                    text.append(piece["choices"][0]["text"])
        return {"status": answer.status_code, "text": "".join(text), "times": times}


async def send_all(url, requests, *, at_once=8, **other):
    """Send requests, some at a time; ``stream`` alternates where it is not given."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:
        gate = asyncio.Semaphore(at_once)
        given = [other if "stream" in other else other | {"stream": bool(i % 2)} for i in range(len(requests))]
        return await asyncio.gather(
            *(send(client, one, gate, **more) for one, more in zip(requests, given, strict=True))
        )


def receipts_of(server, request_id):
    """Return the receipts of a request, by index."""
    answer = server.client.get(f"/api/v1/receipts/{request_id}")
    answer.raise_for_status()
    lines = [(dumps(one["receipt"]) + "\n").encode() for one in answer.json()["receipts"]]
    return sorted((parse_receipt(line) for line in lines), key=lambda receipt: receipt.index)


def begin(server, block=BLOCK):
    """Post a block, from which on answers are seeded."""
    server.post("/responses/block", {"block_hash": block}).raise_for_status()


def prompts_of(requests):
    """Return the prompts of requests by their hashes."""
    return {prompt.sha256: prompt for prompt in (Prompt.of(request.prompt) for request in requests)}


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


def of_device(arguments):
    """Return the options of a server on this device."""
    return ON_GPU if arguments.gpu else {}
