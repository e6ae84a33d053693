"""An application that listens on a port of this machine."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from assay.poc.service import create_app
from assay.poc.service.service_controller import Controller
from tests.waiting import until


@contextmanager
def on_port(config: uvicorn.Config, end: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Run a server to the end of the block, and give its port once it has started; ``end`` is
    called before it ends.
    """
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            end()
            server.should_exit = True
            thread.join()


@contextmanager
def listening(controller: Controller) -> Iterator[int]:
    """Run the application of a controller, and give its port once its model is loaded."""
    with on_port(
        uvicorn.Config(create_app(controller), log_config=None), controller.closing.set
    ) as port:
        until(lambda: controller.deployment is not None)
        yield port
