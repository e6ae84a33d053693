"""Names that Unicode spells in two ways: composed (NFC), and taken apart (NFD).

Both look alike, and editors and file systems turn one into the other. A name that goes over a wire
or into a seed text is refused where it is not NFC; any other is compared as NFC.
"""

from pathlib import Path
from unicodedata import normalize


def normal_form(name: str) -> str:
    """Return a name in the normal form NFC, in which names are compared."""
    return normalize("NFC", name)


def existing_spelling(path: Path) -> Path:
    """Return a path, or its NFC or NFD spelling where that exists and the path does not."""
    spellings = (Path(normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((spelling for spelling in (path, *spellings) if spelling.exists()), path)
