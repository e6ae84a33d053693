"""Number formats of a fingerprint: that of the weights, and after a plus that of a cache that rounds keys and values.

Honest noise is that of the format, so whatever moves results as far as a format does has its name in it.
"""

from assay import streams
from assay.models import NUMBER_FORMATS

CACHES = ("fp8_e4m3-cache",)
"""Caches of keys and values in fewer bits than the model's dtype has."""

_PLUS = "+"
_OF_WEIGHTS = (*streams.DTYPES, *NUMBER_FORMATS)

FORMATS = (*_OF_WEIGHTS, *(f"{one}{_PLUS}{cache}" for cache in CACHES for one in _OF_WEIGHTS))
"""Every number format that a fingerprint may name."""


def with_cache(dtype: str, cache: str) -> str:
    """Return the number format of an engine whose cache is in a format of its own; ``cache`` is empty where it is not.

    Example:
        >>> with_cache("bfloat16", "fp8_e4m3-cache"), with_cache("bfloat16", "")
        ('bfloat16+fp8_e4m3-cache', 'bfloat16')
    """
    return f"{dtype}{_PLUS}{cache}" if cache else dtype


def of_weights(dtype: str) -> str:
    """Return the part of a number format that says how the weights are stored, in which a model is loaded.

    Example:
        >>> of_weights("bfloat16+fp8_e4m3-cache")
        'bfloat16'
    """
    return dtype.partition(_PLUS)[0]
