"""Builds: the engines that a network allows, as what their fingerprints may say."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from assay import streams
from assay.errors import UsageError
from assay.models.quantized import NUMBER_FORMATS
from assay.poc.protocol.record import SEPARATOR, Fingerprint
from assay.poc.protocol.round import MAX_NAME

CACHES = ("fp8_e4m3-cache",)
"""Caches of keys and values in fewer bits than the model's dtype has."""

_PLUS = "+"
_OF_WEIGHTS = (*streams.DTYPES, *NUMBER_FORMATS)

FORMATS = (*_OF_WEIGHTS, *(f"{one}{_PLUS}{cache}" for cache in CACHES for one in _OF_WEIGHTS))
"""Every number format that a fingerprint may name: that of the weights, and after a plus that of a cache.

Honest noise is that of the format, so the name has whatever moves results as far as a format does.
"""


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


ANY = "*"


def _in_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


def _printable(text: str) -> str:
    if len(text) > MAX_NAME or not text.isprintable():
        raise ValueError(f"at most {MAX_NAME} printable characters")
    return text


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError('the words of a fingerprint, or "*"')
    return text


def _known(text: str) -> str:
    if text not in FORMATS:
        raise ValueError(" or ".join(FORMATS))
    return text


Name = Annotated[str, AfterValidator(_printable)]
OneOrMore = (Field(min_length=1), BeforeValidator(_in_tuple))
Words = Annotated[tuple[Annotated[Name, AfterValidator(_not_empty)], ...], *OneOrMore]
Counts = Annotated[tuple[Annotated[int, Field(strict=True, ge=0)] | Literal["*"], ...], *OneOrMore]
Formats = Annotated[tuple[Annotated[str, BeforeValidator(_known)], ...], *OneOrMore]


class Build(BaseModel):
    """One build that may prove a model: for every field of a fingerprint the values that are allowed.

    A value is a text, or a list of which each will do. ``"*"`` allows any, and a text that ends with ``*`` any that
    begins so, such as ``"2.9.*"``. The dtype has no wildcard: honest noise is that of the number format, so a prover
    that may choose it chooses how wide the law is. Positions of a nonce belong to the round.

    Args:
        name: Name of the build, for people.
        engine: Names of engines, ``hf`` or ``vllm``.
        device: Names of processors or GPUs.
        dtype: Number formats of the weights, with that of a cache that rounds: :data:`FORMATS`.
        attention: Names of attention implementations.
        batch_size: Numbers of nonces of a batch.
        threads: Numbers of CPU threads; 0 on a GPU.
        torch: Versions of torch.
        library: Libraries that run the model, with their versions.
        kernels: Choices beside the defaults of the library, each list of them as one text, joined by commas; ``""``
            for none.

    Example:
        >>> known = {"name": "H100", "engine": "vllm", "device": "NVIDIA H100*", "dtype": "bfloat16"}
        >>> free = dict.fromkeys(("attention", "batch_size", "threads", "torch", "library", "kernels"), "*")
        >>> Build.model_validate(known | free).free
        ('device', 'attention', 'batch_size', 'threads', 'torch', 'library', 'kernels')
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = ""
    engine: Words
    device: Words
    dtype: Formats
    attention: Words
    batch_size: Counts
    threads: Counts
    torch: Words
    library: Words
    kernels: Annotated[tuple[Name, ...], *OneOrMore]

    @classmethod
    def of(cls, fingerprint: Fingerprint, *, name: str = "") -> "Build":
        """Return the build that allows this fingerprint alone, at any number of positions.

        Raises:
            UsageError: A text of the fingerprint is a wildcard or cannot be printed, or its dtype is no number format.
        """
        stated = describe_build(fingerprint)
        odd = [field for field, value in stated.items() if str(value).endswith(ANY)]
        try:
            build = cls.model_validate({"name": name, **stated})
        except ValidationError as error:
            odd = [str(error.errors()[0]["loc"][0]), *odd]
        if odd:
            raise UsageError(
                f"a fingerprint with {odd[0]} {stated[odd[0]]!r:.60}",
                wanted="the plain words of an engine",
                do="take the build from an honest proof of this version",
            )
        return build

    def differing(self, fingerprint: Fingerprint) -> tuple[str, ...]:
        """Return the names of the fields in which a fingerprint is not of this build."""
        return tuple(name for name, value in describe_build(fingerprint).items() if not self.allows(name, value))

    def allows(self, name: str, value: str | int) -> bool:
        """Return whether a field of a fingerprint may have a value."""
        return any(_matches(value, wanted) for wanted in getattr(self, name))

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fields with a wildcard."""
        return tuple(name for name in FIELDS if any(str(value).endswith(ANY) for value in getattr(self, name)))


FIELDS = tuple(name for name in Build.model_fields if name != "name")


def describe_build(fingerprint: Fingerprint) -> dict[str, str | int]:
    """Return the fields of a fingerprint that a build names, with the kernels as one text."""
    values = {name: getattr(fingerprint, name) for name in FIELDS}
    return values | {"kernels": SEPARATOR.join(fingerprint.kernels)}


def nearest_build(builds: Sequence[Build], fingerprint: Fingerprint) -> tuple[Build | None, tuple[str, ...]]:
    """Return the build that an engine is nearest to, None without any, and the fields in which it differs."""
    found = ((build, build.differing(fingerprint)) for build in builds)
    return min(found, key=lambda pair: len(pair[1]), default=(None, ()))


def _matches(stated: str | int, wanted: str | int) -> bool:
    if isinstance(wanted, str) and wanted.endswith(ANY):
        return str(stated).startswith(wanted.removesuffix(ANY))
    return stated == wanted
