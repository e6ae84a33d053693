"""The fingerprint of an engine: everything that can move the last bits of what it computes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Fingerprint"]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything about an engine that can move the last bits of a hidden state.

    Two engines with equal fingerprints return equal bits. Noise between two different ones is
    what a calibration measures.
    """

    engine: str
    device: str
    dtype: str
    attention: str
    batch_size: int
    seq_len: int
    threads: int
    torch: str
    library: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the proof header."""
        return asdict(self)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the whole."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]
