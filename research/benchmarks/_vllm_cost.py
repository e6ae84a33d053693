"""The cost of receipts: servers that write them and servers that do not, under the same load in turns."""

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import product

import psutil
from _common import note
from _vllm import Server
from _vllm_answers import SEEDED, begin, of_device, send_all

from assay.poc.responses import Request, Sampling

COMPILED = {"--enforce-eager": False, "--max-num-batched-tokens": "8192", "--max-model-len": "1024"}


def load(count, tokens, *, seeds=True, **sampling):
    """Return requests for the measurement of cost, with seeds of their own or without."""
    return [
        Request(
            prompt=tuple(range(100 + number % 50, 164 + number % 50)),
            request_id=f"load-{time.time_ns()}-{number}",
            user_seed=str(number) if seeds else "",
            sampling=Sampling(**sampling),
            max_tokens=tokens,
        )
        for number in range(count)
    ]


def busy(server):
    """Return the seconds that the processes of a server have computed for, by their names."""
    found, whole = Counter(), psutil.Process(server.process.pid)
    for process in (whole, *whole.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found["API server" if process == whole else process.name()] += times.user + times.system
    return found


def measure(server, requests, at_once):
    """Return tokens a second, the median time between two tokens, and the time each process computes for one.

    A piece of a stream may have several tokens, so those that were asked for are counted. The time that a process
    computes for hardly depends on what else the machine does.
    """
    before, started = busy(server), time.perf_counter()
    answers = asyncio.run(send_all(server.url, requests, at_once=at_once, stream=True, ignore_eos=True))
    seconds = time.perf_counter() - started
    tokens = sum(request.max_tokens for request in requests)
    gaps = [1000 * (b - a) for one in answers for a, b in zip(one["times"][1:], one["times"][2:], strict=False)]
    assert {one["status"] for one in answers} == {200}
    return {
        "tokens_per_second": tokens / seconds,
        "gap_ms": statistics.median(gaps),
        "busy_us": {name: 1e6 * (end - before[name]) / tokens for name, end in busy(server).items()},
    }


def cost(arguments):
    """Return the figures of both kinds of servers for every way of sampling.

    Two servers of one kind differ too, by where a process lies on a machine. So there may be several of each, and turns
    before a block is known, in which the seeded ones sample as the others do.
    """
    options = {"--model": arguments.model, "--dtype": arguments.dtype} | of_device(arguments)
    options |= COMPILED if arguments.gpu else {}
    kinds = {"without": {}, "seeded": SEEDED}
    samplings = [{"temperature": arguments.temperature, "top_p": top_p} for top_p in arguments.top_p]
    ways = list(product(samplings, arguments.tokens))
    with ExitStack() as ending, ThreadPoolExecutor() as pool:
        servers = {}
        for number, (kind, environment) in product(range(arguments.servers), kinds.items()):
            folder = ending.enter_context(tempfile.TemporaryDirectory())
            servers[kind, number] = Server(folder, environment=environment, options=options)
            ending.callback(servers[kind, number].stop)
        list(pool.map(Server.start, servers.values()))
        alike = [in_turns(servers, arguments, arguments.alike, *way) for way in ways if arguments.alike]
        seeded = [server for (kind, _), server in servers.items() if kind == "seeded"]
        for server in seeded:
            begin(server)
        rows = [in_turns(servers, arguments, arguments.turns, *way) for way in ways]
        stored = [server.get("/responses").json()["receipts"] for server in seeded]
    return {"before_a_block": alike, "ways": rows, "receipts": stored}


def in_turns(servers, arguments, turns, sampling, tokens):
    """Return the figures of all servers, turn by turn, for one way of sampling and one length of answers."""
    found = []
    for turn in range(turns + 1):
        order = list(servers) if turn % 2 else list(reversed(servers))
        requests = {name: load(arguments.requests, tokens, seeds=not arguments.no_seeds, **sampling) for name in order}
        figures = {name: measure(servers[name], requests[name], arguments.at_once) for name in order}
        both = {kind: [figures[name] for name in servers if name[0] == kind] for kind in ("without", "seeded")}
        note(f"{tokens} tokens, turn {turn}: {json.dumps(both)}")
        if turn:  # the first one warms up
            found.append(both)
    return {
        "sampling": sampling,
        "tokens": tokens,
        "turns": found,
        **compared("throughput", found, lambda one: ratio("tokens_per_second", one["seeded"], one["without"])),
        **compared("gap", found, lambda one: ratio("gap_ms", one["without"], one["seeded"])),
        **compared("of_one_kind", found, lambda one: ratio("tokens_per_second", one["without"][:1], one["without"])),
        "load": os.getloadavg(),
    }


def ratio(name, over, under):
    """Return the ratio of the means of a figure over some servers."""
    return statistics.mean(one[name] for one in over) / statistics.mean(one[name] for one in under)


def compared(name, turns, ratio_of):
    """Return the median of a ratio over turns, and its quartiles."""
    values = [ratio_of(turn) for turn in turns]
    quartiles = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values
    return {f"{name}_ratio_median": statistics.median(values), f"{name}_ratio_quartiles": quartiles}
