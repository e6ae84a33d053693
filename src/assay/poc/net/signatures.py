"""Signatures of callbacks, as Standard Webhooks defines them, checked against any of several secrets."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from standardwebhooks import Webhook, WebhookVerificationError

from assay.poc.net.refusals import Refusal

LONGEST_ID = 128


class Signatures:
    """Checks who sent a body: any of the secrets will do, and without any nothing is checked."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._verifiers = [Webhook(secret) for secret in secrets]

    def __bool__(self) -> bool:
        return bool(self._verifiers)

    def check(self, body: str, headers: Mapping[str, str]) -> None:
        """Refuse a body that no secret signed within the last five minutes (401), or that cannot be read (400).

        The names of ``headers`` are in lower case.
        """
        if not self._verifiers:
            return
        given = dict(headers)
        for verifier in self._verifiers[:-1]:
            with suppress(WebhookVerificationError, ValueError):
                verifier.verify(body, given, json_parse=False)
                return
        try:
            self._verifiers[-1].verify(body, given, json_parse=False)
        except WebhookVerificationError as error:
            raise unsigned(401, f"signature: {error}") from None
        except ValueError as error:
            raise unsigned(400, f"signature: {error}") from None


def message_id(headers: Mapping[str, str]) -> str:
    """Return the id under which a callback is kept once; refuse with 400 none, or one of more than 128 characters."""
    found = headers.get("webhook-id", "")
    if not 0 < len(found) <= LONGEST_ID:
        raise unsigned(400, "no webhook-id")
    return found


def unsigned(status: int, seen: str) -> Refusal:
    """Return the refusal of a callback that is not one of assay, or not signed."""
    return Refusal(status, seen, wanted="a signed callback of assay", do="give both sides the same --callback-secret")
