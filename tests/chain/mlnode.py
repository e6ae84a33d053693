"""A stand-in of MLNode: one address before several servers, of which it reads status 200 alone."""

import json
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx

from tests.end_to_end.receiver import Answering

PUBLISHED = "/api/v1/pow"
PATH = "/api/v1/inference/pow"


class MLNode(Answering):
    """Calls servers by their ports, all of them or one in turn."""

    def __init__(self, ports: list[int]) -> None:
        super().__init__()
        self.ports = ports
        self._client = httpx.Client(timeout=60)
        self._turn = 0

    def close(self) -> None:
        super().close()
        self._client.close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("content-length") or 0)
        body = json.loads(handler.rfile.read(size) or b"{}")
        status, reply = self.reply(handler.command, handler.path.removeprefix(PATH), body)
        text = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def reply(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return status and body of an answer."""
        if path == "/status":
            answers = [(port, self._ask(port, "GET", path)) for port in self.ports]
            servers = [
                {"port": port, **(answer.json() if answer.status_code == 200 else {})}
                for port, answer in answers
            ]
            return 200, {
                "status": aggregate([s.get("status") for s in servers]),
                "backends": servers,
            }
        if path == "/generate":
            port = self.ports[self._turn % len(self.ports)]
            self._turn += 1
            defaults = {"batch_size": 32, "wait": False, "poc_stronger_rng": False}
            sent = defaults | body | {"params": {"k_dim": 12} | body["params"]}
            answer = self._ask(port, "POST", path, sent)
            if answer.status_code != 200:
                return answer.status_code, {"detail": answer.text}
            data = answer.json()
            return 200, data | {"request_id": f"{port}:{data['request_id']}"}
        results, errors = [], []
        for group, port in enumerate(self.ports):
            sent = {}
            if path == "/init/generate":
                sent = {"batch_size": 32, "poc_stronger_rng": False, **body}
                sent |= {"group_id": group, "n_groups": len(self.ports)}
                sent["params"] = {"k_dim": 12} | body["params"]
            answer = self._ask(port, "POST", path, sent)
            (results if answer.status_code == 200 else errors).append({"port": port})
        if path == "/init/generate" and not results:
            return 502, {"detail": {"errors": errors}}
        return 200, {"status": "OK", "results": results, "errors": errors or None}

    def _ask(self, port: int, method: str, path: str, body: object = None) -> httpx.Response:
        try:
            url = f"http://127.0.0.1:{port}{PUBLISHED}{path}"
            return self._client.request(method, url, json=body)
        except httpx.HTTPError:
            return httpx.Response(500, text="no answer")


def aggregate(states: list[str | None]) -> str:
    """Return one state for those of all servers."""
    if set(states) == {"GENERATING"}:
        return "GENERATING"
    return "IDLE" if set(states) == {"IDLE"} else "MIXED"
