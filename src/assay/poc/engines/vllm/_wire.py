"""What the serving process and its workers exchange: keys of streams, request ids, and the round itself.

Everything that crosses a process is a plain type, so that vLLM needs no insecure serialisation.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from typing import Any

from assay.errors import UsageError
from assay.poc.protocol import Pipeline, Round, get_pipeline


@dataclass(frozen=True)
class Spec:
    """The round of a stream of nonces, and its preset."""

    round: Round
    preset: str

    @property
    def pipeline(self) -> Pipeline:
        """The row of the table of pipelines."""
        return get_pipeline(self.preset)

    def dumps(self) -> str:
        """Return the text that crosses the process."""
        return json.dumps({"round": asdict(self.round), "preset": self.preset})

    @classmethod
    def loads(cls, text: str) -> "Spec":
        """Read the text back.

        Raises:
            UsageError: The text does not describe a round.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(Round(**values["round"]), get_pipeline(values["preset"]).name)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"a round {text!r:.80}: {error}", wanted="what Spec.dumps writes", do="see there"
            ) from None


def new_key() -> str:
    """Return the key of a new stream. It cannot be guessed: clients may choose request ids on some routes."""
    return f"assay-{secrets.token_hex(16)}"


def request_id(key: str, nonce: int) -> str:
    """Return the id of the request of a nonce."""
    return f"{key}.{nonce}"


def split_id(text: str) -> tuple[str, int] | None:
    """Return key and nonce of a request id as a worker sees it, with the suffix that vLLM appends; None for others."""
    key, _, rest = text.rpartition(".")
    digits = rest.partition("-")[0]
    if not key.startswith("assay-") or not (digits.isascii() and digits.isdigit() and len(digits) <= 16):
        return None
    return key, int(digits)
