"""Stop texts: whether the text of an answer has one, token by token and in linear time.

The text of an answer is what is decoded after that of its prompt: a letter may be several tokens,
and many tokenizers drop a space at the start of what they decode. A window of last tokens is
decoded, whose text is the end of the whole and longer than every stop. Tokenizers of bytes
(`<0xE6>`) decode a run of them as a whole: one byte that is no text turns all of it into
replacement characters, so the state of its bytes and the text before it are kept.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Any

from assay.errors import UsageError
from assay.models.token_text import added_text, decode_tokens

# What tokenizers write for a byte that is no text.
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_LETTER = 4  # bytes of the longest letter
VIEWS = False, True  # whether special tokens are left out of the text of an answer
# Tokens of a window, and characters of its text, beside those of the longest stop.
_MORE = 8


class StopSearch:
    """Looks for stop texts in an answer as it grows.

    A text may be looked for by a server that leaves special tokens out, or by one that does not: it
    is found in either, or with ``views`` in the text that leaves them out (True) or has them.

    Raises:
        UsageError: There are stop texts, and no tokenizer.
    """

    def __init__(
        self,
        stops: Sequence[str],
        prompt: Sequence[int],
        tokenizer: Any,
        *,
        views: Sequence[bool] = VIEWS,
    ) -> None:
        if stops and tokenizer is None:
            raise UsageError(
                "stop texts for a model without a tokenizer",
                wanted="stops of token ids",
                do="give stop_token_ids in place of stop",
            )
        self._views = [
            _GrowingText(stops, prompt, tokenizer, skips=skips) for skips in views if stops
        ]

    def add(self, token: int) -> bool:
        """Add a token, and return whether a stop text is in the text with it."""
        # Every view must have the token, so that the next one is decoded after it.
        ended = [view.add(token) for view in self._views]
        return any(ended)


class _GrowingText:
    """The end of a text that grows by tokens, in which stop texts are looked for."""

    def __init__(
        self, stops: Sequence[str], prompt: Sequence[int], tokenizer: Any, *, skips: bool
    ) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._skips = skips
        added = getattr(tokenizer, "added_tokens_decoder", {}) if skips else {}
        self._skipped = {token for token, content in added.items() if content.special}
        # A head may have more rows than there are tokens. They have no text, and a window that no
        # text fills would grow with the answer.
        self._count = len(tokenizer)
        self._longest = max(map(len, stops))
        byte = getattr(tokenizer, "convert_tokens_to_ids", lambda _: None)("<0xFF>")
        # Whether bytes are tokens, of which a run is text or none.
        self._has_bytes = byte is not None and self._decode([byte]) == _NO_TEXT
        self._run = _ByteRun()
        self._window = [token for token in prompt if self._has_text(token)]
        for token in self._window:
            self._run.add(self._byte_of(token))
        self._head = self._decode(self._window)  # what the window has of the prompt's text
        self._new = ""  # text of the answer in the window
        self._before_run: str | None = None  # that before a run which began in the answer
        self._most = 0  # tokens of the window before it is shortened
        self._shorten(self._head)

    def add(self, token: int) -> bool:
        if not self._has_text(token):
            return False
        self._window.append(token)
        self._run.add(self._byte_of(token))
        if self._run.length < 2:
            self._before_run = self._new[-self._longest :] if self._run.length else None
        text = self._decode(self._window)
        self._new = added_text(self._head, text)
        texts = [self._new]
        if self._before_run is not None and not self._run.is_text:
            texts.append(self._before_run + _NO_TEXT * min(self._run.length, self._longest))
        if len(self._window) > self._most:
            self._shorten(text)
        return any(stop in searched for stop in self._stops for searched in texts)

    def _has_text(self, token: int) -> bool:
        return token < self._count and token not in self._skipped

    def _shorten(self, text: str) -> None:
        """Leave tokens out of the window, whose text is given."""
        run = self._run
        count = len(self._window)
        first = max(0, count - run.length)  # of the run at the end
        last = count - self._longest - _MORE
        if run.broken_after is not None and first < last:
            # What broke it, and as many of the same character as a stop may have.
            end = max(0, count - run.length + run.broken_after)
            broken = range(max(first, end - _LETTER), end)
            self._keep([*broken, *range(max(end, last), count)])
        elif start := self._start(text, last if run.is_text else min(first, last)):
            self._keep(range(start, count))
        elif run.broken_after is None and not run.is_text:
            return  # after the next byte, perhaps
        self._most = len(self._window) * 3 // 2 + _MORE

    def _start(self, text: str, last: int) -> int:
        """Return where a shorter window may begin; 0 where it may not."""
        count = len(self._window)
        while last > 0:
            for start in range(last, max(0, last - _LETTER), -1):
                rest = self._decode(self._window[start:])
                begins = not 0x80 <= (self._byte_of(self._window[start]) or 0) < 0xC0
                if begins and len(rest) >= self._longest + _MORE and text.endswith(rest):
                    return start
            last -= count - last
        return 0

    def _keep(self, places: Sequence[int]) -> None:
        self._window = [self._window[place] for place in places]
        text = self._decode(self._window)
        self._head = text[: max(0, len(text) - len(self._new))]

    def _byte_of(self, token: int) -> int | None:
        """Return the byte that a token stands for; None where it stands for text."""
        if not self._has_bytes:
            return None
        named = _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "")
        return int(named[1], 16) if named else None

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode_tokens(self._tokenizer, tokens, skip_special_tokens=self._skips)


class _ByteRun:
    """The tokens of bytes at the end of a text: how many, and whether they are text."""

    length = 0
    broken_after: int | None = None  # number of tokens after which no more make text of them

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, byte: int | None) -> None:
        """Add the byte of the next token; None, where it is text, ends the run."""
        self.length = 0 if byte is None else self.length + 1
        try:
            if byte is None:
                self.broken_after = None
                self._decoder.reset()
            elif self.broken_after is None:
                self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self.broken_after = self.length

    @property
    def is_text(self) -> bool:
        return self.broken_after is None and not self._decoder.getstate()[0]
