"""The listening socket."""

import socket

import pytest

from assay.poc.net.server import listen


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_answers_are_not_held_back(host):
    """asyncio sets TCP_NODELAY on what it accepts only where the listener names its protocol."""
    with listen(host, 0) as listener:
        listener.listen()
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.proto == socket.IPPROTO_TCP
