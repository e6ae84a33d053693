"""A service that listens on a port of this machine."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from assay.poc.service import create_app
from assay.poc.service.controller import Controller
from tests.waiting import until


@contextmanager
def listening(controller: Controller) -> Iterator[int]:
    """Run the application of a controller to the end of the block, and give its port once its model is loaded."""
    server = uvicorn.Server(uvicorn.Config(create_app(controller), log_config=None))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started and controller.deployment is not None)
        yield listener.getsockname()[1]
        controller.closing.set()
        server.should_exit = True
        thread.join()
