"""What to do about a word that is not known, and about an error of the operating system."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from assay.errors import StorageError
from assay.files.storage import storage_error
from assay.settings import NEAR


def nearest(word: str, choices: Iterable[str], else_do: str) -> str:
    """Return what to do about a word that is not known."""
    near = get_close_matches(word, choices, n=1, cutoff=NEAR)
    return f"did you mean {near[0]}? Else {else_do}" if near else else_do


def in_assay_words(error: OSError) -> StorageError:
    """Return an error of the operating system in the three parts of every error."""
    return storage_error(Path(str(error.filename or "output")), error)
