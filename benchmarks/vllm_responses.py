"""Seeded responses of a vLLM server: the tokens of transformers, and the cost beside a server without them.

`tokens` sends requests of mixed parameters to one server and answers the same requests with `respond` on transformers:
the receipts must have the same tokens. `cost` runs two servers, one with ASSAY_RESPONSES=seeded and a block, one with
neither, and sends both the same load in turns, so that whatever else the machine does falls on both: tokens a second,
and the time between two tokens of a stream.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from _common import note, parser, publish
from _vllm import BEGINNINGS, MODEL, REFERENCE, Server

from assay.models import load_model
from assay.poc.protocol import SKETCH_EVERY
from assay.poc.responses import Request, Sampling, parse_receipt, respond
from assay.reports import dumps

BLOCK, NODE = "block-of-responses", "node"
SEEDED = {"ASSAY_RESPONSES": "seeded", "ASSAY_RESPONSES_PUBLIC_KEY": NODE}


def mixed(count, tokenizer, *, seed=0, tokens=(1, 80)):
    """Return requests of mixed prompts and parameters, the first of them with one parameter of each kind."""
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
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                    text.append(json.loads(line[6:])["choices"][0]["text"])
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


def agreement(server, model, requests):
    """Return how many receipts of a server have the tokens and the sketches that transformers give."""
    answers = asyncio.run(send_all(server.url, requests))
    assert {one["status"] for one in answers} == {200}, answers
    wanted = respond(model, requests, block_hash=BLOCK, public_key=NODE).receipts
    found = [receipts_of(server, request.request_id)[0] for request in requests]
    same = [ours.output == theirs.output for ours, theirs in zip(found, wanted, strict=True)]
    distances = [
        float(abs(ours.sketches.astype(float) - theirs.sketches.astype(float)).max())
        for ours, theirs, equal in zip(found, wanted, same, strict=True)
        if equal
    ]
    return {
        "requests": len(requests),
        "same_tokens": sum(same),
        "tokens": sum(len(receipt.output) for receipt in wanted),
        "largest_difference_of_sketches": max(distances, default=0.0),
        "different": [request.request_id for request, equal in zip(requests, same, strict=True) if not equal][:5],
    }


def load(count, tokens, **sampling):
    """Return requests for the measurement of cost."""
    return [
        Request(
            prompt=tuple(range(100 + number % 50, 164 + number % 50)),
            request_id=f"load-{time.time_ns()}-{number}",
            user_seed=str(number),
            sampling=Sampling(**sampling),
            max_tokens=tokens,
        )
        for number in range(count)
    ]


def measure(url, requests, at_once):
    """Return tokens a second, and the median time between two tokens in milliseconds."""
    started = time.perf_counter()
    answers = asyncio.run(send_all(url, requests, at_once=at_once, stream=True, ignore_eos=True))
    seconds = time.perf_counter() - started
    gaps = [1000 * (b - a) for one in answers for a, b in zip(one["times"][1:], one["times"][2:], strict=False)]
    assert {one["status"] for one in answers} == {200}
    return {
        "tokens_per_second": sum(len(one["times"]) - 1 for one in answers) / seconds,
        "gap_ms": statistics.median(gaps),
    }


def cost(arguments):
    """Return the figures of both servers, turn by turn."""
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    options = {"--model": arguments.model, "--dtype": arguments.dtype}
    with ExitStack() as running:
        servers = {}
        for name, environment in (("without", {}), ("seeded", SEEDED)):
            folder = running.enter_context(tempfile.TemporaryDirectory())
            servers[name] = running.enter_context(Server(folder, environment=environment, options=options))
        begin(servers["seeded"])
        turns = []
        for turn in range(arguments.turns + 1):
            order = ("without", "seeded") if turn % 2 else ("seeded", "without")
            requests = {name: load(arguments.requests, arguments.tokens, **sampling) for name in order}
            figures = {name: measure(servers[name].url, requests[name], arguments.at_once) for name in order}
            note(f"turn {turn}: {json.dumps(figures)}")
            if turn:  # the first one warms up
                turns.append(figures)
        stored = servers["seeded"].get("/responses").json()["receipts"]
    speed = [one["seeded"]["tokens_per_second"] / one["without"]["tokens_per_second"] for one in turns]
    gaps = [one["without"]["gap_ms"] / one["seeded"]["gap_ms"] for one in turns]
    return {
        "sampling": sampling,
        "turns": turns,
        "receipts": stored,
        "throughput_ratio_median": statistics.median(speed),
        "throughput_ratio_quartiles": statistics.quantiles(speed, n=4)[::2] if len(speed) > 1 else speed,
        "gap_ratio_median": statistics.median(gaps),
    }


def main():
    made = parser(__doc__)
    made.add_argument("part", choices=("tokens", "cost"))
    made.add_argument("--requests", type=int, default=200, help="of each turn")
    made.add_argument("--tokens", type=int, default=64, help="of an answer, for cost")
    made.add_argument("--turns", type=int, default=6)
    made.add_argument("--at-once", type=int, default=8)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--model", default=str(REFERENCE))
    made.add_argument("--dtype", default="float32")
    arguments = made.parse_args()
    figures = {"part": arguments.part, "model": Path(arguments.model).name, "dtype": arguments.dtype}
    if arguments.part == "tokens":
        model = load_model(arguments.model, dtype=arguments.dtype)
        with tempfile.TemporaryDirectory() as folder, Server(folder, environment=SEEDED) as server:
            begin(server)
            requests = mixed(arguments.requests, model.tokenizer)
            figures |= agreement(server, model, requests) | {"sketch_every": SKETCH_EVERY}
    else:
        figures |= {"at_once": arguments.at_once, "tokens": arguments.tokens} | cost(arguments)
    publish(f"vllm_responses_{arguments.part}", figures, arguments.output)


if __name__ == "__main__":
    main()
