"""Nonces per second through the plugin on an idle server, beside the same server's own prefill of equal prompts.

The own prefill is the same engine asked over HTTP for completions of as many prompt tokens and one token each, with so
many requests in flight that the engine is always full. Both are measured in turns on one server.
"""

import asyncio
import random
import statistics
import tempfile
import time

import httpx
from _common import note, parser, publish
from _vllm import MODEL, Server


async def prefill(url, seq_len, count, concurrency):
    """Return prompts per second of vLLM's own completions route, for random prompts that no cache knows."""
    draw = random.Random(time.time_ns())
    prompts = [[draw.randrange(10, 4000) for _ in range(seq_len)] for _ in range(count)]
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits) as client:
        gate = asyncio.Semaphore(concurrency)

        async def one(prompt):
            async with gate:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0.0}
                (await client.post("/v1/completions", json=body)).raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(one(prompt) for prompt in prompts))
        return count / (time.perf_counter() - started)


def nonces(server, seq_len, count):
    """Return nonces per second of a round, from its own count on disk."""
    server.begin(f"throughput-{time.time_ns()}", seq_len=seq_len, batch_size=32)
    before = server.wait_for(64)
    started = time.perf_counter()
    after = server.wait_for(before + count)
    rate = (after - before) / (time.perf_counter() - started)
    server.post("/stop").raise_for_status()
    return rate


def main():
    made = parser(__doc__)
    made.add_argument("--count", type=int, default=512, help="prompts, and nonces, per turn")
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--concurrency", type=int, default=32)
    made.add_argument("--seq-len", type=int, default=256)
    arguments = made.parse_args()
    rows = []
    options = {"--max-num-batched-tokens": "2048"}
    with tempfile.TemporaryDirectory() as folder, Server(folder, options=options) as server:
        for turn in range(arguments.turns + 1):
            own = asyncio.run(prefill(server.url, arguments.seq_len, arguments.count, arguments.concurrency))
            rate = nonces(server, arguments.seq_len, arguments.count)
            if turn:  # the first one warms up
                rows.append({"own_prefill_per_second": own, "nonces_per_second": rate, "ratio": rate / own})
                note(str(rows[-1]))
    figures = {"seq_len": arguments.seq_len, "count": arguments.count, "concurrency": arguments.concurrency}
    ratio = statistics.median(row["ratio"] for row in rows)
    figures |= {"model": "reference:qwen3 float32", "turns": rows, "ratio_median": ratio}
    publish("vllm_throughput", figures, arguments.output)


if __name__ == "__main__":
    main()
