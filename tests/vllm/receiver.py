"""A receiver of callbacks that can be slow, or refuse."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver:
    """Keeps every callback once, by its id."""

    def __init__(self, *, delay: float = 0.0, status: int = 200) -> None:
        self.delay, self.status = delay, status
        self.bodies: dict[str, dict] = {}
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked += 1
                time.sleep(outer.delay)
                if outer.status == 200:
                    outer.bodies[self.headers["webhook-id"]] = json.loads(body)
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def nonces(self, block: str) -> list[int]:
        """Every nonce that was announced for a block, as often as it was."""
        return [n for body in list(self.bodies.values()) if body["block_hash"] == block for n in body.get("nonces", [])]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
