"""Services on a small model or on none, the servers of a node, and who receives their callbacks."""

import json
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from assay.poc.net.deployment import Deployment
from assay.poc.service import ServiceSettings
from assay.poc.service.service_controller import Controller
from tests.end_to_end.receiver import Answering
from tests.poc.service.listening import listening


class Machine:
    """A service that can be ended and started again on its data, each time on another port."""

    def __init__(self, folder: Path, deployment: Deployment, **settings: Any) -> None:
        self._deployment = deployment
        self._settings = ServiceSettings(
            data_dir=folder,
            allow_private_callbacks=True,
            callback_interval=0.05,
            callback_backoff=0.05,
            callback_backoff_max=0.5,
            **settings,
        )
        self._running = ExitStack()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start, and wait until the model is there."""
        controller = Controller(lambda: self._deployment, self._settings)
        self.port = self._running.enter_context(listening(controller))

    def end(self) -> None:
        """End as SIGTERM does."""
        self._running.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


class Participant(Answering):
    """The chain's receiver: keeps artifacts by nonce, and verdicts; may be slow."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.paths: set[str] = set()
        self.artifacts: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
        self.verdicts: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        time.sleep(self.delay)
        with self._lock:
            self.paths.add(handler.path)
            if handler.path.endswith("/validated"):
                self.verdicts.append(body)
            else:
                of_node = self.artifacts[body["block_hash"], body["node_id"]]
                for artifact in body["artifacts"]:  # the first of a nonce is kept
                    of_node.setdefault(artifact["nonce"], artifact["vector_b64"])
        handler.send_response(200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
