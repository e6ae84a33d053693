"""The fingerprint of an engine: everything that can move the last bits of what it computes."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Fingerprint"]

SEPARATOR = ", "


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything about an engine that can move the last bits of a hidden state.

    Two engines with equal fingerprints return equal bits. Noise between two different ones is what a calibration
    measures.

    Args:
        engine: Name of the engine, for instance ``hf`` or ``vllm``.
        device: Name of the processor or GPU.
        dtype: Number format of the weights.
        attention: Name of the attention implementation.
        batch_size: Number of nonces of a batch.
        seq_len: Number of positions of a nonce.
        threads: Number of CPU threads; 0 on a GPU.
        torch: Version of torch.
        library: Library that runs the model, and its version.
        kernels: Choices beside the defaults of that library, for instance ``compiled`` or ``tp 2``. In a file they
            follow the library in one text, joined by commas.
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
    kernels: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the proof header, with the kernels joined to the library."""
        values = asdict(self)
        values["library"] = SEPARATOR.join([self.library, *values.pop("kernels")])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Fingerprint":
        """Return the fingerprint that :meth:`as_dict` wrote.

        Raises:
            KeyError: the library is missing.
            TypeError: another field is missing or unknown.
        """
        library, *kernels = values["library"].split(SEPARATOR)
        return cls(**{**values, "library": library}, kernels=tuple(kernels))

    @classmethod
    def written_fields(cls) -> set[str]:
        """Return the names of the fields of :meth:`as_dict`."""
        return {field.name for field in fields(cls)} - {"kernels"}

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the whole."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]
