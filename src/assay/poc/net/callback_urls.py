"""Callback URLs: which addresses are allowed (no forged requests into private networks).

A host is resolved once per delivery, every address it has must be allowed, and the connection goes
to the address that was checked. Redirects are never followed.
"""

import asyncio
import ipaddress
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urlencode

import httpx

from assay.poc.net.refusals import Refusal

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PRIVATE = tuple(
    ipaddress.ip_network(network)
    for network in (
        # The special-purpose registry of IANA (RFC 6890), multicast and class E.
        *(
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
        ),
        *(
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
        ),
        "224.0.0.0/3",
        # In 2000::/3: protocol assignments and Teredo, documentation, and tunnels to IPv4 (6to4).
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
"""Addresses that are not public."""

GLOBAL_V6 = ipaddress.ip_network("2000::/3")

_WRITTEN = re.compile(r"https?://\[?([^][/?#@]+?)\]?(?::[0-9]*)?([/?][^#]*)?", re.IGNORECASE)
# A name whose end is a number is an address to the resolver: 2130706433, 127.1 and 0x7f.1 are
# 127.0.0.1.
_NAME = r"(?!(.*\.)?([0-9]+|0x[0-9a-f]*)\.?$)(?=.{1,254}$)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?"
_HOST = re.compile(rf"{_NAME}|[0-9]+(\.[0-9]+){{3}}|.*:.*")

_DNS = ThreadPoolExecutor(4, "assay-dns")
"""Threads of their own: a name server that does not answer holds each for many seconds."""
_CLIENTS_DNS = ThreadPoolExecutor(4, "assay-clients-dns")
"""Those for names that clients chose, so that the operator's never wait for them."""


class Blocked(Exception):
    """A host whose addresses are not allowed."""


def check_url(url: str | None, *, allow_private: bool) -> None:
    """Refuse a callback URL that can never be called; None is no URL. Needs no network."""
    if url is None:
        return
    try:
        parsed = httpx.URL(url)
        host, sent, shown = parsed.raw_host.decode(), parsed.raw_path.decode(), parsed.host
        if parsed.port is not None and not 0 < parsed.port < 65_536:
            raise ValueError(f"port {parsed.port}")
    except (httpx.InvalidURL, ValueError) as error:
        raise _refusal(f"callback URL: {error}") from None
    form = _WRITTEN.fullmatch(url)
    if form is None or parsed.userinfo:
        raise _refusal(
            "callback URL with a user name, a password or a fragment, or of another scheme than "
            "http"
        )
    is_kept = form[1].lower() in (host, shown) and (form[2] or "").removeprefix("/") == sent[1:]
    if not (is_kept and _HOST.fullmatch(host)):
        raise _refusal(
            "callback URL with . or .., an odd host (write addresses as 192.0.2.1) or port, or "
            "signs sent as %XX"
        )
    if allow_private:
        return
    try:
        address = _address(host)
    except ValueError:
        if f".{host.rstrip('.')}".endswith(".localhost"):
            raise _refusal("callback URL to this machine") from None
        return
    if not _is_public(address):
        raise _refusal(f"callback URL to the private address {address}")


def new_client(timeout: float, connections: int) -> httpx.AsyncClient:
    """Return a client for :func:`call`, which never follows a redirect."""
    # trust_env off: a proxy from the environment would resolve names by itself.
    limits = httpx.Limits(max_connections=connections)
    client = httpx.AsyncClient(
        follow_redirects=False, trust_env=False, timeout=timeout, limits=limits
    )
    # Cookies of one receiver would go to the others.
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
    return client


async def call(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    path: str,
    *,
    allow_private: bool,
    headers: dict[str, str],
    content: bytes | None = None,
    params: dict[str, int] | None = None,
    of_client: bool = False,
) -> httpx.Response:
    """Call a path below a URL at one checked address of it; the response body is not read.

    ``of_client`` says that a client chose the URL, and not the operator.

    Raises:
        Blocked: An address of the host is not public.
        OSError: The name cannot be resolved.
        httpx.HTTPError: There was no answer.
    """
    host = httpx.URL(url)
    address = await resolve(url, allow_private=allow_private, of_client=of_client)
    # Nobody but the owner of a URL decodes it: a slash that is written as %2F does not part two
    # names.
    written, mark, query = host.raw_path.partition(b"?")
    query_string = b"&".join(filter(None, (query, urlencode(params or {}).encode())))
    below = (
        written.removesuffix(b"/")
        + path.encode()
        + (b"?" + query_string if mark or query_string else b"")
    )
    request = client.build_request(
        method,
        host.copy_with(host=address, raw_path=below),
        content=content,
        headers=headers | {"Host": host.netloc.decode("ascii"), "User-Agent": "assay"},
        extensions={"sni_hostname": host.raw_host.decode().removesuffix(".")},
    )
    try:
        return await client.send(request, stream=True)
    except ValueError as error:  # of a Location, which httpx reads though it follows none
        raise httpx.RemoteProtocolError(f"{type(error).__name__}: {error}"[:200]) from None


async def resolve(url: str, *, allow_private: bool, of_client: bool = False) -> str:
    """Return an address of a URL's host, after every address that it has was checked.

    Raises:
        Blocked: One of them is not public.
        OSError: The name cannot be resolved.
    """
    parsed = httpx.URL(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    # As it is asked for: Python's own form of an international name can be that of another host.
    look_up = partial(socket.getaddrinfo, parsed.raw_host.decode(), port, type=socket.SOCK_STREAM)
    threads = _CLIENTS_DNS if of_client else _DNS
    try:
        entries = await asyncio.get_running_loop().run_in_executor(threads, look_up)
    except UnicodeError as error:
        raise OSError(f"host name: {error}") from None
    addresses = [str(entry[4][0]) for entry in entries]
    if not allow_private:
        for address in addresses:
            if not _is_public(_address(address)):
                raise Blocked(
                    f"{parsed.host} has the private address {address}, which needs "
                    f"allow_private_callbacks"
                )
    return addresses[0].partition("%")[0]


def _address(text: str) -> Address:
    return ipaddress.ip_address(text.strip("[]").partition("%")[0])


def _is_public(address: Address) -> bool:
    """Return whether every network can reach an address. IPv6 forms that hold an IPv4 address are
    not public.
    """
    if isinstance(address, ipaddress.IPv6Address) and address not in GLOBAL_V6:
        return False
    return not any(address in network for network in PRIVATE)


def _refusal(fault: str) -> Refusal:
    return Refusal(
        422,
        fault,
        wanted="an http or https URL to a public address, without credentials",
        do="correct the URL; for a private network set allow_private_callbacks in the --config "
        "file, or ASSAY_ALLOW_PRIVATE_CALLBACKS=1",
    )
