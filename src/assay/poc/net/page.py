"""Assembles a page from its parts, with a content security policy that allows exactly these parts."""

import base64
import hashlib
from importlib import resources
from string import Template

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

SHARED = ("stream.js", "words.js", "dom.js", "link.js")
"""Scripts that every page of assay begins with, in the order of their dependence."""


def page_router(page: str, headers: dict[str, str]) -> APIRouter:
    """Return the route ``/``. The page holds no data: it reads the event stream, which asks for a key."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return router


def assemble_page(package: str, *, brand: str, name: str, mark: str) -> tuple[str, dict[str, str]]:
    """Return a page with its frame, style and script, and the headers that it is served with.

    Palette and type are those of the reports. Style and script are allowed by their hash, so that nothing else runs,
    whatever a block hash or a key may hold.

    Args:
        package: Package with the page's ``page.html``, its scripts in the order of their names, and its style if it has
            rules beside those of every page.
        brand: Title of the page.
        name: Word for what the page shows.
        mark: Attributes of the path in its icon.
    """
    files = sorted(file.name for file in resources.files(package).iterdir())
    own = {kind: [part(file, package) for file in files if file.endswith(kind)] for kind in (".css", ".js")}
    style = part("report.css", "assay.pages") + part("page.css") + "".join(own[".css"])
    script = "".join([*map(part, SHARED), *own[".js"]])
    page = Template(part("frame.html")).substitute(
        body=part("page.html", package), brand=brand, name=name, mark=mark, style=style, script=script
    )
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def part(name: str, package: str = "assay.poc.net.assets") -> str:
    """Return a text file of a package: a script, a style or a page."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return the hash that allows an inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
