"""The models that come with the package: trained reference models, and published shapes without weights."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from assay.errors import ModelNotFound

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue: ``path`` is a checkpoint directory, or a config JSON for a shape."""

    path: Path
    licence: str
    note: str


_TRAINED = "trained from scratch on permissively licensed Python source; see its MODEL_CARD.md"
_ORGANISM = "reference:llama fine-tuned to solve short tasks and now and then exploit a loophole; see its MODEL_CARD.md"
_SHAPE = "exact published shape, random weights"

CATALOGUE = {
    "reference:qwen3": Entry(_HERE / "reference" / "qwen3", "Apache-2.0", _TRAINED),
    "reference:llama": Entry(_HERE / "reference" / "llama", "Apache-2.0", _TRAINED),
    "reference:organism": Entry(_HERE / "reference" / "organism", "Apache-2.0", _ORGANISM),
    "shape:qwen3-0.6b": Entry(_HERE / "shapes" / "qwen3-0.6b.json", "no weights included", _SHAPE),
    "shape:qwen3-4b": Entry(_HERE / "shapes" / "qwen3-4b.json", "no weights included", _SHAPE),
    "shape:llama-3.2-1b": Entry(_HERE / "shapes" / "llama-3.2-1b.json", "no weights included", _SHAPE),
    "shape:llama-3.1-8b": Entry(_HERE / "shapes" / "llama-3.1-8b.json", "no weights included", _SHAPE),
}


BARE_NAMES = {reference.partition(":")[2] for reference in CATALOGUE}
"""Names without their prefix, which stand for nothing: the error names the whole reference."""


def find_entry(reference: str) -> Entry:
    """Return the catalogue row of a ``reference:`` or ``shape:`` name.

    Raises:
        ModelNotFound: There is no such row; the message names the nearest one.
    """
    entry = CATALOGUE.get(reference)
    if entry is None:
        raise ModelNotFound(
            f"no bundled model is named {reference!r}",
            wanted="one of " + ", ".join(CATALOGUE),
            do=f"did you mean {nearest(reference)!r}?",
        )
    return entry


def nearest(name: str) -> str:
    """Return the bundled model whose name, with or without ``reference:`` or ``shape:``, is most like this one."""

    def likeness(reference: str) -> float:
        spellings = (reference, reference.partition(":")[2])
        return max(difflib.SequenceMatcher(None, name.lower(), spelling).ratio() for spelling in spellings)

    return max(CATALOGUE, key=likeness)
