"""Chromium on a page of another site: whatever it tries against a service without keys on this
machine is refused.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Page, Response

from tests.end_to_end.killing import BLOCK, SHAPE
from tests.end_to_end.server import Server
from tests.poc.service.dashboard import browser as chromium

pytestmark = pytest.mark.browser

ROUND = json.dumps(BLOCK | SHAPE)
INIT = "/api/v1/pow/init/generate"
STRANGER = "stranger.example"
"""A name of another site, which the browser takes for an address of this machine."""

FETCHES = {
    "cors": "{method: 'POST', body: ROUND, headers: {'Content-Type': 'application/json'}}",
    "simple": "{method: 'POST', body: ROUND}",
    "opaque": "{method: 'POST', mode: 'no-cors', body: ROUND}",
    "opaque text": "{method: 'POST', mode: 'no-cors', body: new Blob([ROUND], {type: "
    "'text/plain'})}",
    "with cookies": "{method: 'POST', credentials: 'include', body: ROUND}",
    "with a key": "{method: 'POST', headers: {Authorization: 'Bearer guessed'}, body: ROUND}",
    "kept alive": "{method: 'POST', mode: 'no-cors', keepalive: true, body: ROUND}",
    "without referrer": "{method: 'POST', mode: 'no-cors', referrerPolicy: 'no-referrer', body: "
    "ROUND}",
}
READS = {
    "status": "fetch(BASE + '/api/v1/pow/status').then((found) => found.text())",
    "opaque status": "fetch(BASE + '/api/v1/pow/status', {mode: 'no-cors'}).then((found) => "
    "found.text())",
    "stream": "new Promise((done) => { const one = new EventSource(BASE + '/api/v1/pow/events');"
    " one.onmessage = (said) => done(said.data); one.onerror = () => done(''); })",
    "XMLHttpRequest": "new Promise((done) => { const one = new XMLHttpRequest(); one.open('POST', "
    "BASE + INIT);"
    " one.onloadend = () => done(one.responseText); one.send(ROUND); })",
    "beacon": "Promise.resolve(String(navigator.sendBeacon(BASE + INIT, new Blob([ROUND], {type: "
    "'text/plain'}))))",
}
ELEMENTS = {
    "image": "<img src='BASE/api/v1/pow/status'>",
    "script": "<script src='BASE/api/v1/pow/status'></script>",
    "style": "<link rel='stylesheet' href='BASE/api/v1/pow/status'>",
    "frame": "<iframe src='BASE/'></iframe>",
    "sandboxed frame": "<iframe sandbox='allow-scripts' srcdoc=\"<script>fetch('BASEINIT', "
    "{method: 'POST',"
    " mode: 'no-cors', body: '{}'})</script>\"></iframe>",
    "object": "<object data='BASE/api/v1/pow/status'></object>",
    **{
        f"{kind} form": f"<iframe name='f'></iframe><form method='post' enctype='{kind}' "
        f"action='BASEINIT' target='f'>"
        "<input name='block_hash' value='b'></form>"
        for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data")
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory, small_checkpoint) -> Iterator[Server]:
    """A service in a process of its own, without keys."""
    made = Server(tmp_path_factory.mktemp("service"), model=small_checkpoint)
    made.start()
    try:
        made.wait_for("/ready")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of another site: every page of it is empty."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><body></body>")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1]
        found.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Chromium, for which a name of another site leads to this machine, as after a change of its
    address.
    """
    with chromium.chromium(f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1") as opened:
        yield opened


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """An empty page, closed with the test."""
    with closing(browser.new_page()) as made:
        yield made


def settled(page: Page, server: Server, answers: list[Response]) -> None:
    """Wait until all requests have ended, and see that none of the service was granted."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(200)
    granted = [(one.request.method, one.url, one.status) for one in answers if one.status < 400]
    assert granted == []
    assert server.status()["state"] == "IDLE"


@pytest.mark.parametrize("origin", [STRANGER, "127.0.0.1"])
@pytest.mark.parametrize("name", [*FETCHES, *READS, *ELEMENTS])
def test_nothing_of_another_site_is_granted(page, server, site, origin, name):
    answers = list[Response]()
    page.goto(f"http://{origin}:{site}/")
    page.on("response", lambda one: answers.append(one) if f":{server.port}" in one.url else None)
    words = f"const [BASE, INIT, ROUND] = ['{server.base}', '{INIT}', '{ROUND}'];"
    if name in ELEMENTS:
        html = ELEMENTS[name].replace("BASEINIT", server.base + INIT).replace("BASE", server.base)
        page.evaluate(
            "(html) => document.body.append(document.createRange().createContextualFragment(html))",
            html,
        )
        if "form" in name:
            page.evaluate("document.querySelector('form').submit()")
    else:
        asked = (
            READS.get(name) or f"fetch(BASE + INIT, {FETCHES[name]}).then((found) => found.text())"
        )
        read = page.evaluate(f"async () => {{ {words} return await {asked}.catch(() => '') }}")
        assert "state" not in read
    settled(page, server, answers)


def test_a_name_that_now_leads_to_this_machine_opens_nothing(page, server):
    assert page.goto(f"http://{STRANGER}:{server.port}/").status == 403
    asked = f"fetch('{INIT}', {{method: 'POST', body: '{ROUND}'}}).then((found) => found.status)"
    assert page.evaluate(f"async () => await {asked}") == 403


def test_the_own_page_is_granted_what_others_are_not(page, server):
    assert page.goto(f"{server.base}/").status == 200
    options = "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: ROUND}"
    asked = f"const ROUND = '{ROUND}'; return await (await fetch('{INIT}', {options})).text()"
    assert '"OK"' in page.evaluate(f"async () => {{ {asked} }}")
    assert server.status()["state"] == "GENERATING"
