"""The fingerprint of an engine: everything about it that can move the last bits of a state."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from assay.files.jsonl import dumps
from assay.poc.protocol.strict_file import STRICT, Text, format_error, read_as

SEPARATOR = ", "  # between the library and its kernels
LARGEST_SIZE = 2**31 - 1  # largest number in a fingerprint

Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything about an engine that can move the last bits of a hidden state.

    Two engines with equal fingerprints return equal bits. Noise between two different ones is what
    a calibration measures.

    Args:
        engine: Name of the engine, for instance ``hf`` or ``vllm``.
        device: Name of the processor or GPU.
        dtype: Number format of the weights, and after a plus that of a cache that rounds keys and
            values.
        attention: Name of the attention implementation.
        batch_size: Number of nonces of a batch.
        seq_len: Number of positions of a nonce.
        threads: Number of CPU threads; 0 on a GPU.
        torch: Version of torch.
        library: Library that runs the model, and its version.
        kernels: Choices beside the defaults of that library, for instance ``compiled`` or ``tp 2``.
            In a file they follow the library in one text, joined by commas, and such a text is
            taken apart.
    """

    __pydantic_config__: ClassVar = STRICT

    engine: Text
    device: Text
    dtype: Text
    attention: Text
    batch_size: Size
    seq_len: Size
    threads: Size
    torch: Text
    library: Text
    kernels: Annotated[tuple[str, ...], Field(fail_fast=True)] = ()

    def __post_init__(self) -> None:
        library, *kernels = self.library.split(SEPARATOR)
        if kernels:
            object.__setattr__(self, "library", library)
            object.__setattr__(self, "kernels", (*kernels, *self.kernels))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the proof header, with the kernels joined to the
        library.
        """
        values = asdict(self)
        values["library"] = SEPARATOR.join([self.library, *values.pop("kernels")])
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Fingerprint":
        """Read what :meth:`as_dict` wrote; a ProofFormatError names the wrong field."""
        fingerprint = read_as(cls, dumps(values).encode())
        if fingerprint.as_dict() != values:
            raise format_error(
                "a fingerprint with kernels", "them in one text with the library, joined by commas"
            )
        return fingerprint

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the whole."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]
