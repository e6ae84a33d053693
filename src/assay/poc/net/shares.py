"""Shares: whatever one client holds of something that there is only so much of leaves enough of it for the others."""

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = 8
"""One client may hold one part of so many, of what has no setting of its own."""


class Shares:
    """Counts what clients hold: up to ``most`` together, and up to ``share`` each.

    A client is a key that was checked, or an address as :func:`client_of` returns it. None is this machine, which has
    no bound of its own: a proxy on it asks for all its clients.
    """

    def __init__(self, most: int, share: int | None = None) -> None:
        self.most, self.share = most, max(1, most // PARTS) if share is None else share
        self._held: Counter[str] = Counter()
        self._all = 0

    def fits(self, client: str | None, amount: int = 1) -> bool:
        """Return whether a client may hold so much more."""
        return self._all + amount <= self.most and (client is None or self._held[client] + amount <= self.share)

    def take(self, client: str | None, amount: int = 1) -> None:
        """Count what a client holds from now on."""
        self._all += amount
        if client is not None:
            self._held[client] += amount

    def give(self, client: str | None, amount: int = 1) -> None:
        """Count what a client no longer holds."""
        self._all -= amount
        if client is None:
            return
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]  # or the addresses of all who ever came would stay in memory

    @contextmanager
    def held(self, client: str | None, amount: int = 1) -> Iterator[None]:
        """Count what a client holds until the block ends."""
        self.take(client, amount)
        try:
            yield
        finally:
            self.give(client, amount)

    def __bool__(self) -> bool:
        return self._all > 0


def client_of(address: str) -> str | None:
    """Return by what an address is counted, however it is spelled; None for an address of this machine.

    Of IPv6 a client has a whole /64. A proxy on this machine names its client in ``X-Forwarded-For``, which the server
    reads from there only.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a socket without addresses, or what a proxy passed on unread
        return address or None
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    if found.is_loopback:
        return None
    return str(found) if found.version == 4 else str(ipaddress.ip_network((int(found), 64), strict=False))
