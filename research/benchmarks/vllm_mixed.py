"""Chat beside Proof of Compute on one vLLM server: tokens, errors, and the time to the first token.

The same requests (chat, completion, both also streaming) are sent at the same times without and with a round that
generates, in turns, so that whatever else the machine does falls on both. With ``--shares`` the load is repeated for
every share: the trade-off table. With ``--receiver`` the round has a callback receiver that answers late, or fails.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from _common import note, parser, publish
from _vllm import Server, chat_once

sys.path.insert(0, str(Path(__file__).parents[1]))

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


def percentile(values, share):
    """Return a percentile of at least one value, in milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def compare(server, arguments, share, turns, receiver):
    """Run turns without and with a round under one share; return the figures."""
    server.post("/engine", {"share": share}).raise_for_status()
    alone, beside, nonces, seconds = [], [], 0, 0.0
    for _ in range(turns):
        alone.append(asyncio.run(load(server.url, arguments.requests, arguments.interval, arguments.tokens)))
        block = f"mixed-{share}-{time.time_ns()}"
        server.begin(block, seq_len=arguments.seq_len, batch_size=8, url=receiver and receiver.url)
        server.wait_for(8)
        before, started = server.checked(), time.perf_counter()
        beside.append(asyncio.run(load(server.url, arguments.requests, arguments.interval, arguments.tokens)))
        nonces += server.checked() - before
        seconds += time.perf_counter() - started
        server.post("/stop").raise_for_status()
    pairs = [pair for a, b in zip(alone, beside, strict=True) for pair in zip(a, b, strict=True)]
    first = [[one["first"] for run in runs for one in run if one["first"]] for runs in (alone, beside)]
    p50 = [percentile(values, 0.5) for values in first]
    return {
        "share": share,
        "requests_beside_nonces": len(pairs),
        "identical": sum(a["text"] == b["text"] for a, b in pairs),
        "statuses": sorted({one["status"] for pair in pairs for one in pair}),
        "nonces_during_chat": nonces,
        "nonces_per_second_during_chat": nonces / seconds,
        "first_token_ms_p50": p50,
        "first_token_ms_p95": [percentile(values, 0.95) for values in first],
        "first_token_p50_ratio": p50[1] / p50[0],
        "different": [(a["kind"], a["text"][:80], b["text"][:80]) for a, b in pairs if a["text"] != b["text"]][:3],
    }


def idle_rate(server, seq_len, seconds=10.0):
    """Return nonces per second on a server without chat."""
    server.begin(f"idle-{time.time_ns()}", seq_len=seq_len, batch_size=32)
    server.wait_for(64)
    before, started = server.checked(), time.perf_counter()
    time.sleep(seconds)
    rate = (server.checked() - before) / (time.perf_counter() - started)
    server.post("/stop").raise_for_status()
    return rate


def main():
    made = parser(__doc__)
    made.add_argument("--requests", type=int, default=100, help="per turn")
    made.add_argument("--turns", type=int, default=2)
    made.add_argument("--interval", type=float, default=0.25, help="seconds between two requests")
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--seq-len", type=int, default=64)
    made.add_argument("--shares", type=float, nargs="*", default=[0.25])
    made.add_argument("--environment", type=json.loads, default={})
    made.add_argument("--receiver", choices=sorted(RECEIVERS), help="callbacks go to one that is slow or fails")
    arguments = made.parse_args()
    receiver = Receiver(**RECEIVERS[arguments.receiver]) if arguments.receiver else None
    with tempfile.TemporaryDirectory() as folder, Server(folder, environment=arguments.environment) as server:
        note("warming up")
        asyncio.run(load(server.url, min(40, arguments.requests), arguments.interval, arguments.tokens))
        idle = idle_rate(server, arguments.seq_len)
        rows = []
        for share in arguments.shares:
            note(f"share {share}")
            rows.append(compare(server, arguments, share, arguments.turns, receiver))
            note(json.dumps(rows[-1]))
        held = server.idle_counts()
    figures = {"requests": arguments.requests, "turns": arguments.turns, "interval_seconds": arguments.interval}
    figures |= {"receiver": arguments.receiver, "callbacks": receiver and receiver.asked}
    figures |= {"seq_len": arguments.seq_len, "model": "reference:qwen3 float32", "idle_nonces_per_second": idle}
    publish("vllm_mixed", figures | {"shares": rows, "left_in_workers": held["workers"]}, arguments.output)
    assert statistics.fmean(row["identical"] == row["requests_beside_nonces"] for row in rows) == 1.0, "tokens differ"


if __name__ == "__main__":
    main()
