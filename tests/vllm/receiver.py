"""A receiver of callbacks that can be slow, or refuse."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver:
    """Keeps every callback once, by its id, while it answers 200 without a delay of seconds or after it."""

    def __init__(self, *, delay: float = 0.0, status: int = 200) -> None:
        self.delay, self.status = delay, status
        self.bodies: dict[str, dict] = {}
        self.asked = 0
        self._mended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked += 1
                status = outer.status
                if outer.delay and outer._mended.wait(outer.delay):
                    status = 503  # it was asked before it was mended, and the sender has given up
                if status == 200:
                    outer.bodies[self.headers["webhook-id"]] = json.loads(body)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args) -> None:
                """Say nothing: a sender that gave up is what a slow receiver is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def nonces(self, block: str) -> list[int]:
        """Every nonce that was announced for a block, as often as it was, in ascending order."""
        bodies = list(self.bodies.values())
        return sorted(n for body in bodies if body["block_hash"] == block for n in body.get("nonces", []))

    def mend(self) -> None:
        """Answer at once from now on."""
        self.delay, self.status = 0.0, 200
        self._mended.set()

    def close(self) -> None:
        self._mended.set()
        self._server.shutdown()
        self._server.server_close()
