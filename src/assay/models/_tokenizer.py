"""The tokenizer of a model, with or without its weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from assay.errors import ModelError
from assay.models._resolve import resolve
from assay.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(reference: str | Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a model without its weights; None where it has none, as a shape.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The tokenizer cannot be read.
    """
    directory = resolve(reference).directory
    return None if directory is None else tokenizer_in(directory)


def tokenizer_in(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer in a directory; None where there is no file of one.

    Raises:
        ModelError: The tokenizer cannot be read.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, down to bare Exception from Rust
        raise ModelError(
            f"the tokenizer in {directory} cannot be read: {error}",
            wanted="tokenizer files that need no code of their own",
            do="save the tokenizer again, or remove its files to load the model without one",
        ) from error
