"""Tokens that spell a text exactly.

Tokenizers of Llama 2 and its kin put a space before every text that they are given, and take one
away from every text that they return. A completion that is tokenised or decoded alone therefore
gains a space or loses one, which in Python is another indentation.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from assay.errors import UsageError
from assay.files.names import normal_form
from assay.models.token_text import decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, none of them special ones that the tokenizer would add."""
    # Not verbose: it would warn of long texts by itself.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return ids


def encode_parts(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: str
) -> tuple[list[int], int]:
    """Return what :func:`encode_texts` does, of one prompt and completion."""
    return next(encode_texts(tokenizer, [(prompt, completion)]))


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[tuple[str, str]]
) -> Iterator[tuple[list[int], int]]:
    """Yield the tokens of each prompt and completion together, and how many are of the prompt.

    The parts are tokenised apart, as a model that goes on from a prompt is given it, where this
    spells the text. Elsewhere the tokens are those of the whole text, and a token across the border
    is one of the completion. Spaces that a special token takes in are no part of the text.

    Raises:
        UsageError: The tokenizer cannot spell the text that comes next. It names the tokenizer.
    """
    prompts, completions = (tokenize(tokenizer, part) for part in zip(*texts, strict=True))
    apart = [
        [*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)
    ]
    spellings = _decode_all(tokenizer, apart)
    for text, prompt, ids, spelling in zip(texts, prompts, apart, spellings, strict=True):
        # A part without a token is for the caller to refuse.
        is_empty = len(prompt) in (0, len(ids))
        if is_empty or _is_spelled("".join(text), spelling):
            yield ids, len(prompt)
        else:
            yield _encode_together(tokenizer, *text)


def _encode_together(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: str
) -> tuple[list[int], int]:
    swallowed = tuple(_swallowed(tokenizer, part) for part in (prompt, completion))
    if swallowed != (prompt, completion):
        return encode_parts(tokenizer, *swallowed)
    text = prompt + completion
    ids = tokenize(tokenizer, [text])[0]
    spellings = _spellings(tokenizer, ids)
    if not any(_is_spelled(text, spelling) for spelling in spellings):
        name = tokenizer.name_or_path or "without a name"
        raise UsageError(
            f"a text that the tokenizer {name} ({type(tokenizer).__name__}) gives back as "
            f"{spellings[0]!r:.60}",
            wanted=f"a tokenizer that keeps {text!r:.60} as it is",
            do="take a model whose tokenizer keeps spaces, line ends and every character",
        )
    return ids, _count_inside(tokenizer, ids, prompt, text)


def _decode_all(
    tokenizer: "PreTrainedTokenizerBase", ids_by_text: list[list[int]]
) -> Sequence[str]:
    """Return the text of each list of tokens; a fast tokenizer takes them on all cores."""
    if tokenizer.is_fast:
        texts: list[str] = tokenizer.backend_tokenizer.decode_batch(
            ids_by_text, skip_special_tokens=False
        )
        return texts
    return [decode_tokens(tokenizer, ids) for ids in ids_by_text]


def _swallowed(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """Return a text without the spaces that special tokens take in, as those of Phi-3 do."""
    for token in tokenizer.added_tokens_decoder.values():
        parts = text.split(token.content)
        if token.lstrip:
            parts[:-1] = [part.rstrip() for part in parts[:-1]]
        if token.rstrip:
            parts[1:] = [part.lstrip() for part in parts[1:]]
        text = token.content.join(parts)
    return text


def _count_inside(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], prompt: str, text: str
) -> int:
    """Return how many tokens lie in the prompt whole."""
    count = len(ids)
    if tokenizer.is_fast:
        offsets = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        count = sum(start <= len(prompt) for start, _ in offsets)
    # Offsets may leave out spaces of a token, so the text decides.
    while count and not any(
        normal_form(prompt).startswith(normal_form(spelling))
        for spelling in _spellings(tokenizer, ids[:count])
    ):
        count -= 1
    return count


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Return the tokens of a prompt with what begins a text, and without what would end it."""
    ids: list[int] = list(tokenizer(prompt, verbose=False)["input_ids"])
    bare = tokenize(tokenizer, [prompt])[0]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids


def recover_spaces(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], text: str, ids: Sequence[int]
) -> str:
    """Return a completion that a trainer decoded alone, with the spaces which that took away."""
    if tokenizer.decode(list(ids), skip_special_tokens=True) != text:
        return text  # the trainer changed it
    return decode_tokens(tokenizer, ids, before=prompt, skip_special_tokens=True)


def _is_spelled(text: str, spelling: str) -> bool:
    """Return whether two texts are equal, with an accent as one character or as two."""
    return text == spelling or (normal_form(text) == normal_form(spelling))


def _spellings(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text of tokens, and that of each stretch between special tokens, joined.

    Llama 2 has a space after a special token, which its decoder takes away only at the beginning.
    """
    special = set(tokenizer.all_special_ids)
    stretches = [list(part) for _, part in groupby(ids, key=special.__contains__)]
    joined = "".join(decode_tokens(tokenizer, stretch) for stretch in stretches)
    return [decode_tokens(tokenizer, ids), joined]
