"""The guard of a service without keys against other hosts and pages of other sites."""

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.poc.net.answers import answer
from assay.poc.net.refusals import Refusal
from assay.poc.net.server_settings import is_loopback


class LocalOnly:
    """Refuses requests for another host name, and those that a page of another site caused.

    Host names can be made to resolve to 127.0.0.1, and a page can send forms, images and scripts
    across sites; either would let a page in the operator's browser use a service that has no keys.
    Paths outside ``prefix``, or outside each of several, are left alone; they are compared as the
    router does, which takes them with the root path (``--root-path``) and without it.
    """

    def __init__(self, app: ASGIApp, *, prefix: str | tuple[str, ...] = "") -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        covered = scope["type"] == "http" and route_path(scope).startswith(self._prefix)
        if covered and not _is_local(dict(scope["headers"])):
            refusal = Refusal(
                403,
                "a request for another host, or from another site's page",
                wanted="Host: 127.0.0.1 and no other origin",
                do="open the service under 127.0.0.1, or start it with an API key",
            )
            await answer(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def route_path(scope: Connection) -> str:
    """Return the path of a request without the root path, as the router compares it."""
    path = str(scope["path"])
    root = str(scope.get("root_path", ""))
    return path[len(root) :] if root and f"{path}/".startswith(f"{root}/") else path


def _is_local(headers: dict[bytes, bytes]) -> bool:
    host = headers.get(b"host", b"")
    foreign = headers.get(b"origin", b"http://" + host) not in (
        b"http://" + host,
        b"https://" + host,
    )
    # Only browsers send it, and no page can change it.
    site = headers.get(b"sec-fetch-site", b"none")
    try:
        named = urlsplit(f"//{host.decode('latin-1')}").hostname or ""
    except ValueError:
        return False
    return not foreign and site in (b"none", b"same-origin") and is_loopback(named)
