"""Bearer keys and what they may do."""

import hashlib
import hmac
import ipaddress
from enum import StrEnum

from assay.poc.service._refusals import Refusal
from assay.poc.service._settings import Settings

__all__ = ["Keys", "Scope", "is_loopback"]


class Scope(StrEnum):
    """What a request needs. ``control`` may do everything, ``validate`` also reads."""

    CONTROL = "control"
    VALIDATE = "validate"
    READ = "read"


_INCLUDES = {
    Scope.CONTROL: {Scope.CONTROL, Scope.VALIDATE, Scope.READ},
    Scope.VALIDATE: {Scope.VALIDATE, Scope.READ},
    Scope.READ: {Scope.READ},
}


class Keys:
    """The keys of a service, kept as digests.

    Args:
        settings: holds the keys. Without any, everyone who reaches the port may do everything.
    """

    def __init__(self, settings: Settings) -> None:
        by_scope = (
            (Scope.CONTROL, settings.api_keys),
            (Scope.VALIDATE, settings.validate_keys),
            (Scope.READ, settings.read_keys),
        )
        self._digests = [(_digest(key), _INCLUDES[scope]) for scope, keys in by_scope for key in keys]

    def check(self, authorization: str | None, scope: Scope) -> None:
        """Refuse a request whose ``Authorization`` header does not allow ``scope``.

        Raises:
            Refusal: 401 without a known key, 403 with one that may do less.
        """
        if not self._digests:
            return
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if kind.lower() == "bearer" else b""
        # Every key is compared, in constant time, so that the time says nothing about which one was close.
        granted = [scopes for digest, scopes in self._digests if hmac.compare_digest(digest, given)]
        if not granted:
            raise Refusal(401, "no valid API key", wanted="Authorization: Bearer KEY", do="send the key you were given")
        if scope not in granted[0]:
            raise Refusal(403, "a key of another scope", wanted=f"one that may {scope}", do="ask for such a key")


def is_loopback(host: str) -> bool:
    """Say whether an address or name is this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
