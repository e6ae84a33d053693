"""The wire form of a published vector: base64 of little-endian binary16."""

import base64
import binascii

import numpy as np

from assay.errors import ProofFormatError

__all__ = ["decode_vector", "encode_vector"]


def encode_vector(vector_K: np.ndarray) -> str:
    """Return a float16 vector [K] as base64 of its little-endian bytes."""
    return base64.b64encode(np.asarray(vector_K).astype("<f2").tobytes()).decode("ascii")


def decode_vector(text: object, size: int) -> np.ndarray:
    """Return the float16 vector [K] that a base64 string stands for.

    Raises:
        ProofFormatError: The value is not a string, not base64, of another length, or not finite.
    """
    try:
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__}")
        raw = base64.b64decode(text, validate=True)
        if len(raw) != 2 * size:
            raise ValueError(f"{len(raw)} bytes")
        vector = np.frombuffer(raw, dtype="<f2").astype(np.float16)
        if not np.isfinite(vector).all():
            raise ValueError("NaN or infinity")
    except (ValueError, binascii.Error) as error:
        raise ProofFormatError(
            f"a vector that is {error}",
            wanted=f"base64 of {size} finite little-endian float16 values",
            do="ask the prover for a new proof",
        ) from None
    return vector
