"""Stop texts: whether the text of an answer has one, token by token and in linear time.

Tokens of an answer have no text of their own: a letter may be several of them, the bytes of a run
are text or none together, and many tokenizers drop a space at the start of what they decode. So the
text of an answer is what is decoded after the text of its prompt, and a window of last tokens is
decoded only from a token on at which the text before was whole.
"""

from collections.abc import Sequence
from typing import Any

from assay.models.token_text import added_text, decode_tokens

# What tokenizers write for bytes that are no text.
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"


class StopSearch:
    """Looks for stop texts in an answer as it grows.

    A text may be looked for by a server that leaves special tokens out, or by one that does not: it
    is found in either.
    """

    def __init__(self, stops: Sequence[str], prompt: Sequence[int], tokenizer: Any) -> None:
        self._views = [
            _GrowingText(stops, prompt, tokenizer, skip_special_tokens=skip)
            for skip in (False, True)
            if stops
        ]

    def add(self, token: int) -> bool:
        """Add a token, and return whether a stop text is in the text with it."""
        # Every view must have the token, so that the next one is decoded after it.
        ended = [view.add(token) for view in self._views]
        return any(ended)


class _GrowingText:
    """The end of a text that grows by tokens, in which stop texts are looked for."""

    def __init__(
        self,
        stops: Sequence[str],
        prompt: Sequence[int],
        tokenizer: Any,
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._overlap = max(map(len, stops)) - 1
        # A byte that comes later turns what was decoded into such characters, back to the start.
        self._slides = not any(_NO_TEXT in stop for stop in stops)
        self._settled_tokens = list(prompt)
        self._settled = self._decode(prompt)
        self._new_tokens: list[int] = []
        self._tail = ""

    def add(self, token: int) -> bool:
        self._new_tokens.append(token)
        text = self._decode([*self._settled_tokens, *self._new_tokens])
        new = added_text(self._settled, text)
        searched = self._tail + new
        if self._slides and new and not new.endswith(_NO_TEXT):
            # The tokens of this text begin the next window: of them a first space may be lost.
            self._tail = searched[max(0, len(searched) - self._overlap) :]
            self._settled_tokens = self._new_tokens
            self._settled = self._decode(self._settled_tokens)
            self._new_tokens = []
        return any(stop in searched for stop in self._stops)

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode_tokens(self._tokenizer, tokens, skip_special_tokens=self._skips)
