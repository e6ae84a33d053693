"""A receiver of callbacks that can be slow, or refuse."""

import json
import threading
from http.server import BaseHTTPRequestHandler

from tests.end_to_end.receiver import Answering


class Receiver(Answering):
    """Keeps every callback once, by its id, while it answers 200 without a delay of seconds or
    after it.
    """

    def __init__(self, *, delay: float = 0.0, status: int = 200) -> None:
        self.delay = delay
        self.status = status
        self.bodies: dict[str, dict] = {}
        self.asked = 0
        self._mended = threading.Event()
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        self.asked += 1
        status = self.status
        if self.delay and self._mended.wait(self.delay):
            status = 503  # it was asked before it was mended, and the sender has given up
        if status == 200:
            self.bodies[handler.headers["webhook-id"]] = json.loads(body)
        self.respond(handler, status)

    def nonces(self, block: str) -> list[int]:
        """Every nonce that was announced for a block, as often as it was, in ascending order."""
        bodies = list(self.bodies.values())
        return sorted(
            n for body in bodies if body["block_hash"] == block for n in body.get("nonces", [])
        )

    def mend(self) -> None:
        """Answer at once from now on."""
        self.delay = 0.0
        self.status = 200
        self._mended.set()

    def close(self) -> None:
        self._mended.set()
        super().close()
