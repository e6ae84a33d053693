"""Where callbacks may go: the guard against requests forged into private networks.

A host is resolved once per delivery, every address it has must be allowed, and the connection goes to the address
that was checked. Redirects are never followed.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

import httpx

from assay.poc.service._refusals import Refusal

__all__ = ["Blocked", "Target", "check_url", "resolve"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Blocked(Exception):
    """A host whose addresses are not allowed."""


@dataclass(frozen=True)
class Target:
    """A URL with the address that its host was checked to have."""

    url: httpx.URL
    address: str

    @property
    def pinned(self) -> httpx.URL:
        """The URL with the address in the place of the host."""
        return self.url.copy_with(host=self.address)

    @property
    def host_header(self) -> str:
        """The ``Host`` that the receiver expects."""
        return self.url.netloc.decode("ascii")


def check_url(url: str, *, allow_private: bool) -> None:
    """Refuse a callback URL that can never be called. Needs no network.

    Raises:
        Refusal: 422, another scheme than http and https, credentials, or an address that is not public.
    """
    try:
        parsed = httpx.URL(url)
        host = parsed.host
        if not 0 < (parsed.port or 80) < 65_536:
            raise ValueError(f"port {parsed.port}")
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise _refusal(f"callback URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not host:
        raise _refusal(f"callback URL with scheme {parsed.scheme!r}")
    if parsed.userinfo:
        raise _refusal("callback URL with a user name or password")
    if allow_private:
        return
    try:
        address = _address(host)
    except ValueError:
        if host.rstrip(".").lower() == "localhost" or host.lower().rstrip(".").endswith(".localhost"):
            raise _refusal("callback URL to this machine") from None
        return
    if not _is_public(address):
        raise _refusal(f"callback URL to the private address {address}")


async def resolve(url: str, *, allow_private: bool) -> Target:
    """Resolve a URL's host and check every address it has.

    Raises:
        Blocked: one of them is not public.
        OSError: the name cannot be resolved.
    """
    parsed = httpx.URL(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(parsed.host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"host name: {error}") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_private:
        for address in addresses:
            if not _is_public(_address(address)):
                raise Blocked(f"{parsed.host} is the private address {address}")
    return Target(parsed, addresses[0].partition("%")[0])


def _address(text: str) -> Address:
    return ipaddress.ip_address(text.strip("[]").partition("%")[0])


def _is_public(address: Address) -> bool:
    """Say whether an address is reachable by everyone, looking through IPv6 forms that hold an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast


def _refusal(seen: str) -> Refusal:
    return Refusal(
        422,
        seen,
        wanted="an http or https URL to a public address, without credentials",
        do="correct the URL; for receivers in a private network start the service with --allow-private-callbacks",
    )
