"""A vLLM server whose clients leave, whose rounds are stopped and whose cache is too small, and
what is left of it.

Rounds run one after the other, those with odd numbers as requests only, and each is stopped in its
middle, which aborts the nonces inside. Beside them clients chat, and part of them hang up while
they are answered. The cache has blocks for few of them, so vLLM preempts. The figures in
research/results/vllm_leaks.json are those of ten thousand nonces.
"""

import asyncio
import contextlib
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
from _vllm import ForkedServer, chat_once

from tests.vllm.conftest import ON_GPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU, reason="the cache is too small for the blocks of a GPU's kernels"),
]

SEQ_LEN = 32
OPTIONS = {
    "--block-size": "32",
    "--num-gpu-blocks-override": "16",
    "--max-model-len": "256",
    "--max-num-batched-tokens": "80",  # two nonces and a half: nonces are cut into chunks
    "--max-num-seqs": "16",
}
ENVIRONMENT = {
    "ASSAY_SEQ_LEN": str(SEQ_LEN),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "ASSAY_VLLM_SHARE": "1",
    "ASSAY_VLLM_CHAT_IN_FLIGHT": "8",
    "ASSAY_VLLM_QUIET": "0.2",
}
VISITORS = 8
LEAVING = 0.5  # part of the chat requests whose client hangs up


class Visitors:
    """Clients that chat until they are told to go, from a thread of their own."""

    def __init__(self, url, seed):
        self.seen = Counter()
        self.fullest = 0.0
        self._url = url
        self._random = random.Random(seed)
        self._going = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._going.set()
        self._thread.join()

    async def _all(self):
        await asyncio.gather(*(self._one(index) for index in range(VISITORS)))

    async def _one(self, index):
        while not self._going.is_set():
            index += VISITORS
            async with httpx.AsyncClient(base_url=self._url, timeout=120.0) as client:
                tokens = self._random.randrange(32, 224)
                answer = asyncio.ensure_future(chat_once(client, index, tokens=tokens))
                if self._random.random() < LEAVING:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(answer, self._random.uniform(0.01, 0.8))
                    self.seen["left" if answer.cancelled() else "answered"] += 1
                else:
                    self.seen["answered" if (await answer)["status"] == 200 else "refused"] += 1
            await asyncio.sleep(self._random.uniform(0.0, 1.5))


def measured(server, name):
    """Return the sum of a metric of vLLM."""
    found = re.findall(
        rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", server.client.get("/metrics").text, re.MULTILINE
    )
    return sum(map(float, found))


def look(server):
    """Return what an idle server holds, and how many descriptors each of its processes has open."""
    held = server.idle_counts()
    # vLLM says how full its cache is at the end of a step only.
    server.client.post(
        "/v1/completions", json={"model": "qwen3", "prompt": "x = ", "max_tokens": 1}
    ).raise_for_status()
    processes = [psutil.Process(server.process.pid), *server._children()]
    return {
        "held": sum(
            worker[name]
            for worker in held["workers"]
            for name in ("rows", "filled", "streams", "errors")
        ),
        "requests": held["chat"]
        + held["nonces"]
        + measured(server, "num_requests_(?:running|waiting)"),
        "cache_used": measured(server, "kv_cache_usage_perc"),
    }, [descriptors(process) for process in processes]


def descriptors(process):
    """Return the number of open file descriptors of a process, without those of the database."""
    found = []
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            found.append("service.sqlite3" not in str(descriptor.readlink()))
    return sum(found)


def rounds(server, seed, first, until, deadline):
    """Run rounds until so many nonces are on disk; return the next number, the nonces, and what
    visitors saw.
    """
    chosen = random.Random(seed)
    number = first
    done = 0
    with Visitors(server.url, seed) as visitors:
        while done < until and time.monotonic() < deadline:
            server.post(
                "/engine", {"path": "requests" if number % 2 else "auto"}
            ).raise_for_status()
            server.begin(f"round-{number}", seq_len=SEQ_LEN, batch_size=chosen.choice((1, 8, 32)))
            server.wait_for(chosen.randrange(50, 400))
            time.sleep(chosen.uniform(0.0, 0.3))
            visitors.fullest = max(visitors.fullest, measured(server, "kv_cache_usage_perc"))
            server.post("/stop").raise_for_status()
            done += server.checked()
            number += 1
    return number, done, visitors


def test_no_row_no_block_and_no_descriptor_is_left_and_chat_goes_on(tmp_path: Path):
    deadline = time.monotonic() + 600
    with ForkedServer(tmp_path, options=OPTIONS, environment=ENVIRONMENT) as server:
        number, done, first = rounds(server, 20, 0, 200, deadline)
        _, before = look(server)
        _, later, rest = rounds(server, 21, number, 400, deadline)
        (left, after), preempted = look(server), measured(server, "num_preemptions_total")
    assert not any(left.values()), left
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    assert min(done, later) >= 200
    assert min(first.fullest, rest.fullest) > 0  # blocks in use are seen
    assert preempted > 0
    clients = first.seen + rest.seen
    assert min(clients["left"], clients["answered"]) > 0
    assert set(clients) == {"left", "answered"}
