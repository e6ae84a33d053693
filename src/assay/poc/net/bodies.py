"""Bodies of requests: how long one may be, how slowly it may come, and how many at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from assay.poc.net.refusals import Refusal
from assay.poc.net.shares import PARTS, Shares, client_of

BODY_SECONDS = 30.0  # in which a body must have arrived
BODY_FLOOR = 2**14  # bytes that come in a second at least
BODY_GRACE = 8.0  # seconds by which a body may be behind that
SMALL = 2**16
"""Bytes of a small body. Callbacks of a service have fewer."""

DISCARDED = 4
"""How many times its limit a body may come before it is refused. A proxy that still sends a body
when the answer to it comes loses that answer (Caddy does, one time in fifty); proxies in ``deploy``
stop a body where reading it ends."""


class Bodies:
    """Reads request bodies: at most ``most`` bytes each, ``together`` bytes in memory at once.

    Each client has a share of that, and small bodies have room of their own, so that large ones
    never keep a callback out.
    """

    def __init__(self, most: int, together: int) -> None:
        self._most = most
        self._large = Shares(together, max(most, together // PARTS))
        self._small = Shares(max(together // 4, PARTS * SMALL), max(together // 4 // PARTS, SMALL))

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body and count it against the limits until the block ends.

        It is refused with 408 too slow, 413 too large, 503 no room beside the bodies of other
        requests.
        """
        body = bytearray()
        client = client_of(request.client.host) if request.client else None
        announced = request.headers.get("content-length", "0")
        clock = asyncio.get_running_loop().time
        size = int(announced) if announced.isdecimal() else 0
        come = 0
        began = clock()
        room = self._small if size <= SMALL else self._large
        try:
            try:
                async with asyncio.timeout(BODY_GRACE) as limit:
                    async for chunk in request.stream():
                        come += len(chunk)
                        size = max(size, come)
                        if size <= self._most:
                            room.give(client, len(body))
                            room = self._small if size <= SMALL else self._large
                            size_with_chunk = len(body) + len(chunk)
                            if not room.fits(client, size_with_chunk):
                                body.clear()
                                raise Refusal(
                                    503,
                                    "too many large bodies at the same time",
                                    wanted="fewer at a time",
                                    do="send it again",
                                    retry_after=1,
                                )
                            room.take(client, size_with_chunk)
                            body += chunk
                        elif come > DISCARDED * self._most:
                            break
                        now = clock()
                        due = limit.when() or began
                        limit.reschedule(
                            min(
                                due + len(chunk) / BODY_FLOOR,
                                now + BODY_GRACE,
                                began + BODY_SECONDS,
                            )
                        )
            except TimeoutError:
                if size <= self._most:
                    raise Refusal(
                        408,
                        "a body that does not come to its end",
                        wanted=f"{BODY_FLOOR} bytes a second, and all of it in {BODY_SECONDS:g} s",
                        do="resend",
                    ) from None
            if size > self._most:
                raise Refusal(
                    413,
                    "a body that is too large",
                    wanted=f"at most {self._most} bytes",
                    do="split the request",
                )
            yield bytes(body)
        finally:
            room.give(client, len(body))
