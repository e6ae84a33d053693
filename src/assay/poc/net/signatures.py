"""Who signed a callback, as Standard Webhooks defines it."""

import math
import re
import time
from collections.abc import Mapping, Sequence

from standardwebhooks import Webhook, WebhookVerificationError

from assay.errors import DataError
from assay.files.jsonl import JsonObject, loads
from assay.poc.net.refusals import Refusal

_SIGNATURE = re.compile("v1,[A-Za-z0-9+/]{43}=")
LONGEST_ID = 128
# Seconds for which a signature is valid, as in Standard Webhooks.
TOLERANCE = 300.0


class Signatures:
    """Checks the Standard Webhooks signature of a body against several secrets."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = tuple(secrets)

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def check(self, body: str, headers: Mapping[str, str]) -> None:
        """Refuse a body not signed within five minutes (401), or a malformed header (400).

        The names of ``headers`` are in lower case.
        """
        if not self._secrets:
            return
        _check_clock(headers.get("webhook-timestamp", ""))
        # What is not of the form of this version is passed over, as the standard has it.
        forms = filter(_SIGNATURE.fullmatch, headers.get("webhook-signature", "").split())
        headers = {**headers, "webhook-signature": " ".join(forms)}
        for secret in self._secrets:
            try:
                Webhook(secret).verify(body, dict(headers), json_parse=False)
                return
            except (WebhookVerificationError, ValueError) as error:
                fault = unsigned(
                    401 if isinstance(error, WebhookVerificationError) else 400,
                    f"signature: {error}",
                )
        raise fault


def _check_clock(stated: str) -> None:
    """Refuse with 401 a body that was signed too long ago or ahead, and say by how much the clocks
    differ.
    """
    try:
        ahead = float(stated) - time.time()
    except ValueError:  # the standard's own words are better
        return
    if math.isfinite(ahead) and abs(ahead) > TOLERANCE:
        raise Refusal(
            401,
            f"a callback that was signed {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'ago'} by "
            f"the clock here",
            wanted=f"clocks that differ by {TOLERANCE:.0f} s at most",
            do="set both clocks by NTP, and send again",
        )


def parsed(raw: bytes) -> tuple[str, JsonObject]:
    """Return text and object of a body; 400 unless it is strict JSON in UTF-8."""
    try:
        text = raw.decode()
        return text, loads(text, "body")
    except (DataError, UnicodeDecodeError) as error:
        fault = error.seen if isinstance(error, DataError) else "body: it is not UTF-8"
        raise Refusal(
            400,
            fault,
            wanted="the body of a callback of assay",
            do="send it as assay does",
            fields={"fields": ["body"]},
        ) from None


def message_id(headers: Mapping[str, str]) -> str:
    """Return the id that makes a callback idempotent; 400 without one or beyond 128 characters."""
    identifier = headers.get("webhook-id", "")
    if not 0 < len(identifier) <= LONGEST_ID:
        raise unsigned(400, "no webhook-id")
    return identifier


def unsigned(status: int, fault: str) -> Refusal:
    """Return the refusal of a callback that is not one of assay, or not signed."""
    return Refusal(
        status,
        fault,
        wanted="a signed callback of assay",
        do="give both sides the same --callback-secret",
    )
