"""Keys of a server, and what each of them may do."""

import hashlib
import hmac
from enum import StrEnum
from typing import Any

from assay.poc.net.refusals import Refusal
from assay.poc.net.server_settings import ListenerSettings


class Scope(StrEnum):
    """The permission that a request needs: ``control`` includes all, ``validate`` ``read``."""

    CONTROL = "control"
    VALIDATE = "validate"
    READ = "read"

    @property
    def extra(self) -> dict[str, Any]:
        """The ``openapi_extra`` of a route that needs it; :func:`route_class` reads it."""
        return {"security": [{"bearer": []}], "x-scope": str(self)}


class Keys:
    """The keys of a server, stored as digests. Without keys every client may do everything.

    ``needed`` says that requests need a key even then, so that all are refused.
    """

    def __init__(self, settings: ListenerSettings, *, needed: bool = False) -> None:
        self._needed = needed
        scopes = list(Scope)  # the widest first
        by_scope = (settings.api_keys, settings.validate_keys, settings.read_keys)
        self._digests = [
            (_digest(key), scopes[i:]) for i, keys in enumerate(by_scope) for key in keys
        ]

    def check(self, authorization: str | None, scope: Scope) -> str | None:
        """Return the identity of a key's holder for rate limits; None where no key is needed.

        A request whose ``Authorization`` header has no known key is refused (401), or one that may
        do less (403).
        """
        if not (self._digests or self._needed):
            return None
        kind, _, key = (authorization or "").partition(" ")
        digest_of_key = _digest(key.strip()) if kind.lower() == "bearer" else b""
        # Every key is compared, in constant time, so that the time says nothing about which one was
        # close.
        granted = [
            scopes for digest, scopes in self._digests if hmac.compare_digest(digest, digest_of_key)
        ]
        if not granted:
            raise Refusal(
                401,
                "no valid API key",
                wanted="Authorization: Bearer KEY",
                do="send the key you were given",
            )
        if scope not in granted[0]:
            raise Refusal(
                403,
                "a key of another scope",
                wanted=f"one that may {scope}",
                do="ask for such a key",
            )
        return digest_of_key.hex()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
