"""A stand-in for the service: the real page under its real headers, and an event stream that a test
writes.
"""

import copy
import itertools
import json
import math
import queue
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from assay import stats
from assay.poc.service.service_api import render_page
from tests.end_to_end.receiver import Answering

KEY = "read-key-of-the-test"
DIMENSION = 8192
BINS = 48
SNAPSHOT = json.loads(Path(__file__).with_name("snapshot.json").read_text())
"""What a generating service says, but for what the law of distances decides."""
ROUND = SNAPSHOT["round"]


def snapshot(**changes: Any) -> dict[str, Any]:
    """A generating service with 10 000 nonces that lie exactly as the chord law says, and some
    changes.
    """
    low = 1.375
    high = 1.453
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    law = stats.chord_cdf(edges, DIMENSION)
    expected = [10_000 * float(b - a) for a, b in itertools.pairwise(law)]
    share = float(stats.valid_rate(ROUND["r_target"], DIMENSION))
    histogram = {
        "low": low,
        "high": high,
        "counts": [round(mean) for mean in expected],
        "expected": expected,
        "expected_errors": [math.sqrt(mean * (1 - mean / 10_000)) for mean in expected],
        "below": 0,
        "above": 0,
    }
    drawn = {
        "valid": round(10_000 * share),
        "valid_rate": share,
        "expected_rate": share,
        "histogram": histogram,
    }
    return copy.deepcopy(SNAPSHOT | drawn | changes)


class StandIn(Answering):
    """Serves one page on 127.0.0.1. ``send`` gives a snapshot to every open stream; None ends
    them.
    """

    def __init__(self, *, key: str | None = None) -> None:
        self.key = key
        self.refuse: tuple[int, dict[str, str], dict[str, str]] | None = None
        self.asked: list[str] = []
        self._streams: list[queue.Queue[Any]] = []
        self._last: Any = None
        super().__init__()

    def send(self, value: Any) -> None:
        self._last = value
        for stream in self._streams:
            stream.put(value)

    def next(self, value: Any) -> None:
        """Say what the next stream begins with."""
        self._last = value

    def close(self) -> None:
        self.send(None)
        super().close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path != "/api/v1/pow/events":
            page, headers = render_page()
            self.respond(
                handler,
                200,
                page.encode(),
                **{"Content-Type": "text/html; charset=utf-8", **headers},
            )
            return
        self.asked.append(handler.headers.get("Authorization", ""))
        if self.refuse is not None:
            status, body, headers = self.refuse
            self.respond(handler, status, json.dumps(body).encode(), **headers)
        elif self.key is not None and self.asked[-1] != f"Bearer {self.key}":
            body = {
                "detail": "no valid API key",
                "wanted": "Authorization: Bearer KEY",
                "do": "send it",
            }
            self.respond(handler, 401, json.dumps(body).encode(), **{"WWW-Authenticate": "Bearer"})
        else:
            self._stream(handler)

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        stream: queue.Queue[Any] = queue.Queue()
        if self._last is not None:
            stream.put(self._last)
        self._streams.append(stream)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"retry: 2000\n\n")
        while (value := stream.get()) is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            # In two pieces, as a network may deliver it.
            data = f"event: snapshot\ndata: {text}\n\n".encode()
            for piece in (data[:37], data[37:]):
                handler.wfile.write(piece)
                handler.wfile.flush()
        self._streams.remove(stream)
