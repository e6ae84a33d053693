"""The text of token ids, and ids that a model can take; imports no library of models."""

from collections.abc import Iterable, Sequence
from typing import Any

from assay.errors import UsageError


def decode_tokens(
    tokenizer: Any,
    tokens: Sequence[int],
    *,
    before: Sequence[int] = (),
    skip_special_tokens: bool = False,
) -> str:
    """Return the text that tokens add to that of the tokens before them.

    Decoded alone, tokens lose a first space with many tokenizers, and the bytes of a letter that
    began before them.
    """
    head, whole = (
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        for ids in (list(before), [*before, *tokens])
    )
    return added_text(head, whole)


def added_text(head: str, whole: str) -> str:
    """Return a text from where it differs from its head: decoding more may rewrite the end."""
    if whole.startswith(head):
        return whole[len(head) :]
    differs = (place for place, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b)
    return whole[next(differs, len(whole)) :]


def check_tokens(name: str, ids: Iterable[int], rows: int) -> None:
    """Refuse tokens of ``name`` without one of the rows of the embeddings, as a UsageError.

    On CUDA such a token ends the process.
    """
    highest = max(ids, default=0)
    if highest >= rows:
        raise UsageError(
            f"{name} has token {highest}",
            wanted=f"tokens below {rows}, the rows of the embeddings",
            do="use the tokenizer of this model, or resize its embeddings to the tokenizer",
        )
