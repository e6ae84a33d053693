"""Chat beside Proof of Compute on one vLLM server: tokens, errors, the time to the first token, and nonces a second.

The same requests (chat, completion, both also streaming) are sent at the same times without and with a round that
generates, in turns, so that whatever else the machine does falls on both. With `--shares` the load is repeated for
every share of the time that nonces may take. With `--receiver` the round has a callback receiver that answers late, or
fails. Before that the idle server's nonces a second stand beside its own prefill: the same engine asked over HTTP for
completions of as many random prompt tokens and one token each, with so many requests in flight that it is always full.

    python research/benchmarks/vllm_server.py -o research/results/vllm_server.json
"""

import asyncio
import json
import random
import statistics
import tempfile
import time

import httpx
import numpy as np
from _common import note, parser, publish
from _vllm import MODEL, Server, chat_once

from tests.vllm.receiver import Receiver

RECEIVERS = {"slow": {"delay": 30.0}, "failing": {"status": 500}}


async def load(url, count, interval, tokens):
    """Send requests at fixed times; return what each gave."""
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=180.0, limits=limits) as client:
        began = time.perf_counter()

        async def one(index):
            await asyncio.sleep(max(0.0, began + index * interval - time.perf_counter()))
            try:
                return await chat_once(client, index, tokens=tokens)
            except httpx.HTTPError as error:
                return {"kind": "error", "status": 0, "text": repr(error), "first": None}

        return await asyncio.gather(*(one(index) for index in range(count)))


async def prefill(url, seq_len, count, concurrency):
    """Return prompts per second of vLLM's own completions route, for random prompts that no cache knows."""
    draw = random.Random(time.time_ns())
    prompts = [[draw.randrange(10, 4000) for _ in range(seq_len)] for _ in range(count)]
    async with httpx.AsyncClient(base_url=url, timeout=300.0) as client:
        gate = asyncio.Semaphore(concurrency)

        async def one(prompt):
            async with gate:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0.0}
                (await client.post("/v1/completions", json=body)).raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(one(prompt) for prompt in prompts))
        return count / (time.perf_counter() - started)


def nonces(server, seq_len, count):
    """Return nonces per second of a round on an idle server, from its own count on disk."""
    server.begin(f"idle-{time.time_ns()}", seq_len=seq_len, batch_size=32)
    before, started = server.wait_for(64), time.perf_counter()
    rate = (server.wait_for(before + count) - before) / (time.perf_counter() - started)
    server.post("/stop").raise_for_status()
    return rate


def idle(server, arguments):
    """Return nonces and own prompts per second, in turns; the first turn warms up."""
    rows = []
    for _ in range(arguments.turns + 1):
        own = asyncio.run(prefill(server.url, arguments.seq_len, arguments.count, arguments.concurrency))
        rate = nonces(server, arguments.seq_len, arguments.count)
        rows.append({"own_prefill_per_second": own, "nonces_per_second": rate, "ratio": rate / own})
    return {"turns": rows[1:], "ratio_median": statistics.median(row["ratio"] for row in rows[1:])}


def compare(server, arguments, share, receiver):
    """Run turns without and with a round under one share; return the figures."""
    server.post("/engine", {"share": share}).raise_for_status()
    alone, beside, made, seconds = [], [], 0, 0.0

    def talk():
        return asyncio.run(load(server.url, arguments.requests, arguments.interval, arguments.tokens))

    for _ in range(arguments.turns):
        alone.append(talk())
        url = receiver and receiver.url
        server.begin(f"beside-{share}-{time.time_ns()}", seq_len=arguments.seq_len, batch_size=8, url=url)
        server.wait_for(8)
        before, started = server.checked(), time.perf_counter()
        beside.append(talk())
        made += server.checked() - before
        seconds += time.perf_counter() - started
        server.post("/stop").raise_for_status()
    pairs = [pair for a, b in zip(alone, beside, strict=True) for pair in zip(a, b, strict=True)]
    first = [[one["first"] for run in runs for one in run if one["first"]] for runs in (alone, beside)]
    p50, p95 = ([1000 * float(np.quantile(values, share)) for values in first] for share in (0.5, 0.95))
    return {
        "share": share,
        "requests_beside_nonces": len(pairs),
        "identical": sum(a["text"] == b["text"] for a, b in pairs),
        "statuses": sorted({one["status"] for pair in pairs for one in pair}),
        "nonces_during_chat": made,
        "nonces_per_second_during_chat": made / seconds,
        "first_token_ms_p50": p50,
        "first_token_ms_p95": p95,
        "first_token_p50_ratio": p50[1] / p50[0],
        "different": [(a["kind"], a["text"][:80], b["text"][:80]) for a, b in pairs if a["text"] != b["text"]][:3],
    }


def main():
    made = parser(__doc__)
    made.add_argument("--requests", type=int, default=100, help="per turn")
    made.add_argument("--turns", type=int, default=2)
    made.add_argument("--interval", type=float, default=0.25, help="seconds between two requests")
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--seq-len", type=int, default=64)
    made.add_argument("--shares", type=float, nargs="*", default=[0.25])
    made.add_argument("--count", type=int, default=512, help="prompts, and nonces, per turn of an idle server")
    made.add_argument("--concurrency", type=int, default=32, help="own prompts in flight")
    made.add_argument("--options", type=json.loads, default={}, help="options of the server, as JSON")
    made.add_argument("--environment", type=json.loads, default={})
    made.add_argument("--receiver", choices=sorted(RECEIVERS), help="callbacks go to one that is slow or fails")
    arguments = made.parse_args()
    receiver = Receiver(**RECEIVERS[arguments.receiver]) if arguments.receiver else None
    settings = {"options": arguments.options, "environment": arguments.environment}
    figures = {name: getattr(arguments, name) for name in ("requests", "turns", "interval", "seq_len", "receiver")}
    with tempfile.TemporaryDirectory() as folder, Server(folder, **settings) as server:
        figures["idle"] = idle(server, arguments)
        note(json.dumps(figures["idle"]))
        rows = []
        for share in arguments.shares:
            rows.append(compare(server, arguments, share, receiver))
            note(json.dumps(rows[-1]))
        figures |= {"shares": rows, "left_in_workers": server.idle_counts()["workers"]}
    figures["callbacks"] = receiver and receiver.asked
    publish("vllm_server", figures, arguments.output)
    assert all(row["identical"] == row["requests_beside_nonces"] for row in rows), "tokens differ"


if __name__ == "__main__":
    main()
