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


def find_entry(reference: str) -> Entry:
    """The catalogue row of a ``reference:`` or ``shape:`` name.

    Raises:
        ModelNotFound: no such row; the message names the nearest one.
    """
    entry = CATALOGUE.get(reference)
    if entry is not None:
        return entry
    near = difflib.get_close_matches(reference.lower(), CATALOGUE, n=1, cutoff=0.0)
    raise ModelNotFound(
        f"no bundled model is named {reference!r}",
        wanted="one of " + ", ".join(CATALOGUE),
        do=f"did you mean {near[0]!r}?",
    )
