"""The page and its headers, without a browser."""

import base64
import hashlib
import re

from assay.poc.service.service_api import render_page


def test_it_is_served_at_the_root_of_the_service_without_a_key(serving):
    with serving(api_keys=("a-key-that-is-long-enough",)) as service:
        answer = service.client.get("/")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        page, headers = render_page()
        assert answer.text == page
        assert {name: answer.headers[name] for name in headers} == headers
        assert service.client.get("/api/v1/pow/events").status_code == 401


def test_the_policy_allows_its_own_style_and_script_and_nothing_else():
    page, headers = render_page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_it_needs_nothing_from_elsewhere():
    page, _ = render_page()
    assert set(re.findall(r"https?://[^\s'\")>]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:script|img|iframe)[^>]+src=", page)
    assert set(re.findall(r'<link rel="(\w+)" href="(\w+):', page)) == {("icon", "data")}
    assert not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r"\bstyle=|\bon\w+=", page), "the policy would block it"


def test_the_script_never_reads_text_as_html():
    page, _ = render_page()
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "localStorage",
    ):
        assert way not in page
