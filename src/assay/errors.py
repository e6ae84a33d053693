"""Every exception of assay, each class below its kind.

Every message has three parts: what was seen, what was wanted, and what to do next. A part may quote
a file or a request, so a long one is cut, and characters that a terminal would obey are escaped.
"""

from collections.abc import Collection
from functools import partial

LONGEST_PART = 4000
"""Characters of each part of a message."""


class AssayError(Exception):
    """Base of all errors that assay raises on purpose.

    Args:
        seen: Fault, with the offending value.
        wanted: Description of what would have been right.
        do: Next action for the person who reads it.
        field: Parameter of the fault, where it is only one; a command line names its flag.
    """

    def __init__(self, seen: str, *, wanted: str, do: str, field: str = "") -> None:
        self.seen, self.wanted, self.do = map(in_one_line, (seen, wanted, do))
        self.field = field
        super().__init__(self.seen, self.wanted, self.do)

    def __str__(self) -> str:
        return f"{self.seen}\n  wanted: {self.wanted}\n  to do:  {self.do}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling of exceptions.
        return partial(type(self), **vars(self)), ()


class UsageError(AssayError):
    """An argument, flag or setting is outside what it may be."""


class ModelError(AssayError):
    """A model cannot be found, read or run."""


class ModelNotFound(ModelError):
    """No such directory, bundled model, shape preset or hub id."""


class UnsafeCheckpoint(ModelError):
    """The checkpoint is a pickle: reading it would execute code."""


class BadWeights(ModelError):
    """Tensors are missing, have another shape, or are not finite."""


class LayersNotFound(ModelError):
    """The decoder layers of a model could not be located."""


class EngineEnded(ModelError):
    """The engine that ran a model has ended; the next one can compute the rest."""


class ProofError(AssayError):
    """A proof cannot be used."""


class ProofFormatError(ProofError):
    """Not a well-formed proof file. ``seen`` names the line."""


class ProofMismatch(ProofError):
    """A proof made for another model, round or pipeline; ``field`` is the name of the pin."""


class CommitmentBroken(ProofError):
    """Nonces or values that are not those which a node committed to, which is fraud."""


class CalibrationError(ProofError):
    """A calibration file is unreadable or belongs to other fingerprints."""


class DataError(AssayError):
    """A data file is malformed. ``seen`` names the file and line."""


class ResourceError(AssayError):
    """The machine does not have what the work needs."""


class OutOfMemory(ResourceError):
    """No room for a batch of this shape."""


class StorageError(ResourceError):
    """A file cannot be written: disk full, no permission, a directory in the way."""


class BackendUnavailable(AssayError):
    """A compute backend is not installed or has no device."""


def visible(text: str, most: int = LONGEST_PART) -> str:
    """Return a text cut to ``most`` characters, with control characters written out.

    Text from outside must neither steer a terminal nor fill it.
    """
    if len(text) > most:
        text = f"{text[:most]}…"
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def in_one_line(text: str, most: int = LONGEST_PART) -> str:
    """Return a text as :func:`visible` does, with line breaks written out too.

    Text from outside must not look like lines that assay wrote.
    """
    return visible(text, most).replace("\n", r"\n")


def _escaped(char: str) -> str:
    return char if char.isprintable() or char == "\n" else ascii(char)[1:-1]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of Python, torch or a device library means out of memory."""
    if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
        return True
    # On a CPU torch raises a plain RuntimeError, so only its words tell.
    return any(phrase in str(error) for phrase in ("out of memory", "can't allocate memory"))


def reason_of(error: BaseException) -> str:
    """Return an error of any kind in one line, for a person."""
    if isinstance(error, AssayError):
        return error.seen
    return f"{type(error).__name__}: {error}"


def check_choice(name: str, value: object, choices: Collection[object], field: str = "") -> None:
    """Raise UsageError unless the value of a parameter is one of some names."""
    if value not in choices:
        names = " or ".join(map(repr, choices))
        raise UsageError(f"{name}={value!r}", wanted=names, do="choose one of them", field=field)


def not_finite(seen: str, *, wanted: str = "finite hidden states") -> BadWeights:
    """Return the error of a model whose numbers are NaN or infinite."""
    return BadWeights(
        seen,
        wanted=wanted,
        do="check the checkpoint, or use a dtype with more range (--dtype float32)",
    )


def how_to_install(extra: str) -> str:
    """Return how to install the packages of an extra; no public index has assay."""
    return (
        f"install assay with its extra {extra}: pip install '.[{extra}]' in its checkout, or "
        f"'FILE.whl[{extra}]'"
    )
