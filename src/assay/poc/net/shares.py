"""Shares: how much one client may hold of a limited resource, so that others have some."""

import ipaddress
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from assay.poc.net.refusals import Refusal

PARTS = 8
"""One client may hold one part of so many, of what has no setting of its own."""


class Shares:
    """Counts what clients hold: up to ``most`` together, and up to ``share`` each.

    Without a ``share``, :func:`fair_share` says it.

    A client is a key that was checked, or an address as :func:`client_of` returns it. None is this
    machine, which has no bound of its own: a proxy on it asks for all its clients.
    """

    def __init__(self, most: int, share: int | None = None) -> None:
        self.most = most
        self._share = share
        self._held: Counter[str | None] = Counter()
        self._all = 0

    def fits(self, client: str | None, amount: int = 1) -> bool:
        """Return whether a client may hold so much more."""
        own = self._held[client]
        if client is None or self._share is None:
            return amount <= room_of(client, self.most, self._all, own)
        return self._all + amount <= self.most and own + amount <= self._share

    def take(self, client: str | None, amount: int = 1) -> None:
        """Count what a client holds from now on."""
        self._all += amount
        self._held[client] += amount

    def give(self, client: str | None, amount: int = 1) -> None:
        """Count what a client no longer holds."""
        self._all -= amount
        self._held[client] -= amount
        if not self._held[client]:
            # Otherwise the addresses of all clients that ever came would stay in memory.
            del self._held[client]

    @contextmanager
    def held(
        self, client: str | None, what: str, *, do: str, retry_after: int | None = None
    ) -> Iterator[None]:
        """Count one more item of a client until the block ends; 429 beyond its share."""
        if not self.fits(client):
            raise Refusal(
                429,
                f"{self._held[client]} {what} of one client are open, of {self._all} in all",
                wanted="fewer at the same time",
                do=do,
                retry_after=retry_after,
            )
        self.take(client)
        try:
            yield
        finally:
            self.give(client)


def fair_share(most: int, others: int) -> int:
    """Return the share of one client: half of what the others leave; n hold n/(n + 1) together."""
    return (most - others + 1) // 2


def disk_room(folder: Path) -> int:
    """Return the bytes that clients may fill of a disk; a sixteenth is for the server itself."""
    usage = shutil.disk_usage(folder)
    return max(0, usage.free - min(usage.total // 16, 2**28))


def room_of(client: str | None, most: int, held: int, own: int) -> int:
    """Return how much more a client may hold, given the total and its own amount."""
    return most - held if client is None else min(most - held, fair_share(most, held - own) - own)


@lru_cache(maxsize=2**12)
def client_of(address: str) -> str | None:
    """Return the identity of an address for rate limits; None for this machine.

    Of IPv6 a client has a whole /64. A proxy on this machine names its client in
    ``X-Forwarded-For``, which the server reads from there only.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a socket without addresses, or what a proxy passed on unread
        return address or None
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or parsed
    if parsed.is_loopback:
        return None
    return (
        str(parsed)
        if parsed.version == 4
        else str(ipaddress.ip_network((int(parsed), 64), strict=False))
    )
