"""What answering ``GET /status`` before routing saves: processor time of one answer inside the application.

The answer of :class:`QuickStatus` and that of the route take turns; the figures are medians over the turns. Sockets
and the HTTP parser, which cost both the same, are left out.

    python benchmarks/service_status.py
"""

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from assay.poc.service import Controller, Settings, create_app
from assay.poc.service.http._feed import QuickStatus
from tests.poc.service.conftest import PREFIX, Rig

TURNS, CALLS = 7, 2000
SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": f"{PREFIX}/status",
    "raw_path": b"",
    "root_path": "",
    "query_string": b"",
    "server": ("127.0.0.1", 80),
    "client": ("127.0.0.1", 1),
    "headers": [(b"host", b"127.0.0.1")],
}


async def microseconds(app):
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        pass

    started = time.process_time()
    for _ in range(CALLS):
        await app(dict(SCOPE), receive, send)
    return (time.process_time() - started) / CALLS * 1e6


async def measure(app):
    ways = {"quick": QuickStatus._is_plain, "routed": lambda self, scope: False}
    found = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, is_plain in ways.items():
            QuickStatus._is_plain = is_plain
            found[way].append(await microseconds(app))
    return {way: statistics.median(values) for way, values in found.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        controller = Controller(Rig().deployment, Settings(data_dir=Path(directory), seq_len=4))
        for way, value in asyncio.run(measure(create_app(controller))).items():
            print(f"{way}: {value:.0f} µs of processor time per answer")
        controller.close()
