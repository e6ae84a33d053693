"""Callback URLs: what is refused, and that the address that was checked is the one that is
called.
"""

import asyncio
import socket

import httpx
import pytest

from assay.poc.net.callback_urls import Blocked, call, check_url, new_client, resolve
from assay.poc.net.refusals import Refusal
from tests.end_to_end.receiver import Answering

PRIVATE = """
    http://127.0.0.1/ http://[::1]:8080/ http://localhost/ http://LOCALHOST./x http://a.localhost/ http://10.0.0.1/
    http://192.168.1.1/ http://172.16.0.1/ http://169.254.169.254/latest/meta-data http://100.64.0.1/
    http://0.0.0.0/ http://[::ffff:127.0.0.1]/ http://[::ffff:a9fe:a9fe]/ http://[64:ff9b::7f00:1]/
    http://[2002:7f00:1::]/ http://[fe80::1%25eth0]/ http://[fd00::1]/ http://224.0.0.1/
""".split()  # noqa: SIM905
# What Python 3.11 takes for global, or what carries an address of IPv4.
CARRIED = """
    http://[fec0::1]/ http://[64:ff9b:1::7f00:1]/ http://[64:ff9b::808:808]/ http://[::127.0.0.1]/
    http://[::ffff:0:7f00:1]/ http://[3fff::1]/ http://[5f00::1]/ http://[2001:db8::1]/
    http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/ http://192.0.0.8/ http://192.88.99.1/ http://240.0.0.1/
""".split()  # noqa: SIM905
MALFORMED = """
    ftp://8.8.8.8/ file:///etc/passwd http:// //8.8.8.8/ http://user:pw@8.8.8.8/ http://[::1/ http://8.8.8.8:99999/
    http://0177.0.0.1/ javascript:alert(1) http://2130706433/ http://0x7f000001/ http://017700000001/ http://0x7f.1/
    http://127.1/ http://127.0.1/ http://127.0.0.0x1/ http://127.1./ http://0x./ http://a.1/ http://1.2.3.4.5/ http://0X7F.1/
    http://8.8.8.8:0/ http://@8.8.8.8/ http://8.8.8.8/a/../b http://8.8.8.8/./a http://8.8.8.8/é http://8.8.8.8/"
    http://8.8.8.8/a#b http://8.8.8.8# http://8.8.8.8:+80/ http://8.8.8.8:８０/ http://8。8。8。8/ http://8.8.8.8./
    http://a..b/ http://.a/ http://a%2eb/ http://*/ http://xn--a/
""".split()  # noqa: SIM905
# Forms that only the resolver understands: they are names to us, and addresses to it.
DISGUISED = ["http://2130706433/", "http://0x7f.1/", "http://127.1/"]


@pytest.mark.parametrize("url", PRIVATE + CARRIED)
def test_private_addresses_are_refused_unless_allowed(url):
    with pytest.raises(Refusal) as refused:
        check_url(url, allow_private=False)
    assert refused.value.status == 422
    check_url(url, allow_private=True)


@pytest.mark.parametrize("url", MALFORMED)
def test_malformed_urls_are_refused_always(url):
    for allow in (True, False):
        with pytest.raises(Refusal):
            check_url(url, allow_private=allow)


@pytest.mark.parametrize(
    "url",
    [
        "http://8.8.8.8/x",
        "https://example.org:8443/hook?token=1",
        "http://[2606:4700::1]/",
        "http://0x.de/",
    ],
)
def test_public_urls_pass(url):
    check_url(url, allow_private=False)


@pytest.mark.parametrize("url", DISGUISED + PRIVATE[:1])
def test_the_resolved_address_is_what_counts(url):
    with pytest.raises(Blocked):
        asyncio.run(resolve(url, allow_private=False))


def test_one_private_address_among_several_blocks_the_name(monkeypatch):
    answers = [("93.184.215.14", 80), ("10.0.0.5", 80)]

    def found(host, port, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", answer) for answer in answers]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with pytest.raises(Blocked, match=r"10\.0\.0\.5"):
        asyncio.run(resolve("http://rebinding.example/", allow_private=False))


@pytest.mark.parametrize("name", ["faß.example", "xn--fa-hia.example"])
def test_an_international_name_is_asked_for_as_it_is_written(name, monkeypatch):
    """In the form of Python the first is fass.example, which may be another host."""
    asked = []
    answer = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, **kwargs: asked.append(host) or [answer]
    )
    asyncio.run(resolve(f"http://{name}/", allow_private=False))
    assert asked == ["xn--fa-hia.example"]


def test_a_call_goes_to_the_address_that_was_checked(monkeypatch):
    answer = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 8443))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kwargs: [answer])
    sent = []

    async def ask() -> None:
        cookie = {"set-cookie": "of=another; Max-Age=9999"}
        transport = httpx.MockTransport(
            lambda request: sent.append(request) or httpx.Response(200, headers=cookie)
        )
        async with new_client(5.0, 1) as client:
            client._transport = transport
            for url in ("https://rebinding.example:8443/hook/?a=1", "https://other.example:8443/"):
                how = {"allow_private": False, "headers": {"webhook-id": "m"}, "content": b"x"}
                await call(client, "POST", url, "/generated", **how)

    asyncio.run(ask())
    assert str(sent[0].url) == "https://93.184.215.14:8443/hook/generated?a=1"
    assert sent[0].headers["host"] == "rebinding.example:8443"
    assert sent[0].extensions["sni_hostname"] == "rebinding.example"
    assert "cookie" not in sent[1].headers


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/hook%2Fa%3Fb/c?token=x%2By%2F", "/hook%2Fa%3Fb/c/generated?token=x%2By%2F"),
        ("/a%25b%23/", "/a%25b%23/generated"),
        ("/a//?sig=a|b;c&flag&y=%2F+z", "/a//generated?sig=a|b;c&flag&y=%2F+z"),
        ("", "/generated"),
    ],
)
def test_a_url_arrives_as_its_owner_wrote_it(path, asked):
    """A part that was decoded on the way is another part, or none that can be sent."""
    got = []

    class Server(Answering):
        def handle(self, handler) -> None:
            got.append(handler.path)
            self.respond(handler, 200)

    async def send(url: str) -> None:
        async with new_client(5.0, 1) as client:
            for method, more in (("POST", None), ("GET", {"after": 7})):
                answer = await call(
                    client, method, url, "/generated", allow_private=True, headers={}, params=more
                )
                await answer.aclose()

    with Server() as server:
        asyncio.run(send(server.url + path))
    assert got == [asked, asked + ("&" if "?" in asked else "?") + "after=7"]
