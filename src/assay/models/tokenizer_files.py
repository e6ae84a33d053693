"""Tokenizers of checkpoints: bounded before the library reads them."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from assay.errors import ModelError
from assay.files.jsonl import LONGEST_LINE, parts, read_json
from assay.files.reading import read_whole
from assay.models.configuration import silence_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HIGHEST_ID = 2**21
"""The highest token id that is read: the library makes a table as long as the highest."""

_ANY_OF = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_WITH_IDS = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer in a directory, or None where there is no file of one."""
    if not any((directory / name).is_file() for name in _ANY_OF):
        return None
    try:
        for name in _WITH_IDS:
            _check_ids(directory / name)
        for pattern in ("*.jinja", "additional_chat_templates/*.jinja"):
            for path in directory.glob(pattern):
                read_whole(path, LONGEST_LINE)
        with silence_transformers():
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    # The libraries raise many kinds, down to a panic of Rust, which is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizer in {directory} cannot be read: {error}",
            wanted="tokenizer files that need no code of their own",
            do="save the tokenizer again, or remove its files to load the model without one",
        ) from error


def _check_ids(path: Path) -> None:
    """Refuse a tokenizer file that is large, deep or no JSON, or has an id that needs gigabytes."""
    if not path.is_file():
        return
    unchecked: list[Any] = [read_json(path)]
    while unchecked:
        value = unchecked.pop()
        unchecked += parts(value)
        ids = [value] if isinstance(value, int) else []
        if path.name == "tokenizer_config.json":
            # Its ids are keys, and a length in it is often 10**30.
            ids = [int(key) for key in value if key.isdecimal()] if isinstance(value, dict) else []
        if isinstance(value, dict):
            _check_charsmap(path.name, value.get("precompiled_charsmap"))
        highest = max(ids, default=0)
        if highest > _HIGHEST_ID:
            raise ValueError(
                f"{path.name} has the number {highest}, where {_HIGHEST_ID} is the highest token id"
            )


def _check_charsmap(file_name: str, charsmap: object) -> None:
    """Refuse a character map whose first four bytes, a size, make the library take too much."""
    if not isinstance(charsmap, str):
        return
    size = int.from_bytes(base64.b64decode(charsmap[:8].ljust(8, "A"))[:4], "little")
    if size > len(charsmap):
        raise ValueError(
            f"{file_name} has a precompiled_charsmap that is shorter than the part it begins with"
        )
