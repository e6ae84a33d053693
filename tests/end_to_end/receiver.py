"""What answers on 127.0.0.1, and a receiver that misbehaves: late, slow, failing, and closing
connections.
"""

import json
import random
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

MOODS = ("accept", "error", "busy", "reset", "late", "slow", "lost answer")


class Answering(ABC):
    """Listens on 127.0.0.1 until it is closed; ``handle`` answers each request."""

    def __init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.handle(self)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                pass  # the other side was killed, or has given up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @abstractmethod
    def handle(self, handler: BaseHTTPRequestHandler) -> None: ...

    @staticmethod
    def respond(
        handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str
    ) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)


class FlakyReceiver(Answering):
    """Takes callbacks and keeps them; a share ``trouble`` of the requests goes wrong in one of six
    ways.

    ``late`` answers after the sender has given up, ``lost answer`` takes the callback and drops the
    connection: both force the sender to deliver again.
    """

    def __init__(self, *, trouble: float = 0.5, patience: float = 0.5, seed: int = 0) -> None:
        self.trouble = trouble
        self.patience = patience
        self.taken: dict[str, dict] = {}
        self.copies: Counter[str] = Counter()
        self.changed: list[str] = []
        self.moods: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self._lock:
            bad = self._random.random() < self.trouble
            mood = self._random.choice(MOODS[1:]) if bad else "accept"
            self.moods[mood] += 1
            self.requests.append(
                (handler.path, {k.lower(): v for k, v in handler.headers.items()}, body)
            )
            if mood in ("accept", "late", "slow", "lost answer"):
                self._take(handler, body)
        if mood in ("late", "slow"):
            time.sleep(self.patience * (1.5 if mood == "late" else 0.5))
        if mood in ("reset", "lost answer"):
            # Linger of zero: the sender sees a reset, not an orderly end.
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.close_connection = True
            handler.connection.close()
            return
        headers = {"Retry-After": "0"} if mood == "busy" else {}
        self.respond(handler, {"error": 500, "busy": 503}.get(mood, 200), **headers)

    def _take(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        message_id = handler.headers["webhook-id"]
        values = json.loads(body)
        if message_id in self.taken and self.taken[message_id] != values:
            self.changed.append(message_id)
        self.taken[message_id] = values
        self.copies[message_id] += 1

    def nonces(self) -> list[int]:
        """Every nonce of every callback, each callback once, in no particular order."""
        with self._lock:
            return [nonce for body in self.taken.values() for nonce in body["nonces"]]

    def distances(self) -> dict[int, float]:
        with self._lock:
            pairs = [zip(b["nonces"], b["dist"], strict=True) for b in self.taken.values()]
        return {nonce: distance for pair in pairs for nonce, distance in pair}
