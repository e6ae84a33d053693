r"""A teacher pool: stored completions with the log-probabilities they were sampled with.

A file is JSON Lines, one rollout per line::

    {"prompt": "# Task: …", "completion": "    return x\n…", "tokens": [81, …],
     "logprobs": [-0.1, …]}

``tokens`` are those of the completion by the tokenizer of the model that is trained; ``logprobs``
their natural log-probabilities under the distribution that the completion was sampled from,
temperature and all.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from assay.errors import DataError
from assay.files.jsonl import JsonObject
from assay.files.storage import write_jsonl
from assay.models.token_text import decode_tokens
from assay.vhack.pairs.pairs import read_each, validated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = (
    '{"prompt": …, "completion": …, "tokens": […], "logprobs": […]}, a log-probability for every '
    "token"
)
"""What a line has to be."""

_Text = Annotated[str, Field(strict=True)]


@dataclass(frozen=True)
class PoolRollout:
    """One stored completion: its prompt, text, token ids and the log-probability of each token."""

    prompt: _Text
    completion: _Text
    tokens: Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], Field(min_length=1)]
    logprobs: tuple[Annotated[float, Field(strict=True, le=1e-4)], ...]


class RolloutPool:
    """Stored completions by prompt, in the order of their file."""

    def __init__(self, rollouts: Sequence[PoolRollout]) -> None:
        self._by_prompt: dict[str, list[PoolRollout]] = {}
        for rollout in rollouts:
            self._by_prompt.setdefault(rollout.prompt, []).append(rollout)

    def __iter__(self) -> Iterator[PoolRollout]:
        return (rollout for rollouts in self._by_prompt.values() for rollout in rollouts)

    @property
    def prompts(self) -> frozenset[str]:
        """Prompts that have a completion."""
        return frozenset(self._by_prompt)

    def choose(self, prompt: str, count: int, key: object) -> list[PoolRollout]:
        """Return up to ``count`` completions of a prompt; equal keys give equal choices."""
        rollouts = self._by_prompt.get(prompt, [])
        draw = random.Random(f"pool {key} {prompt}")
        return draw.sample(rollouts, min(count, len(rollouts)))

    def save(self, path: str | Path) -> None:
        """Write a pool file.

        Raises:
            StorageError: The file cannot be written.
        """
        write_jsonl(path, map(asdict, self))

    @classmethod
    def load(
        cls, path: str | Path, tokenizer: "PreTrainedTokenizerBase | None", *, max_new_tokens: int
    ) -> "RolloutPool":
        """Read a pool file, and check it against the tokenizer of the trained model if given.

        Raises:
            DataError: The file cannot be read, or a rollout is malformed, of another tokenizer, or
                longer than the trainer accepts, for TRL does not cut longer ones; the message names
                the line.
        """
        read = partial(_read_rollout, tokenizer=tokenizer, max_new_tokens=max_new_tokens)
        return cls(read_each(path, read, what="rollout"))


def _read_rollout(
    record: JsonObject,
    name: str,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    max_new_tokens: int,
) -> PoolRollout:
    """Return a line's rollout; refuse one that is incomplete, of another tokenizer or too long."""
    try:
        rollout = validated(PoolRollout, record)
    except ValueError as error:
        raise DataError(f"{name}: {error}", wanted=FORM, do="correct the line") from None
    count = len(rollout.tokens)
    checks = (
        (
            count == len(rollout.logprobs),
            f"{count} tokens and {len(rollout.logprobs)} log-probabilities",
            FORM,
        ),
        (
            tokenizer is None or _spells(rollout, tokenizer),
            "tokens that do not spell the completion",
            "tokens of the tokenizer of the trained model",
        ),
        (
            count <= max_new_tokens,
            f"a completion of {count} tokens",
            f"at most {max_new_tokens}",
        ),
    )
    for is_good, seen, wanted in checks:
        if not is_good:
            raise DataError(
                f"{name}: {seen}", wanted=wanted, do="correct the line, or leave it out"
            )
    return rollout


def _spells(rollout: PoolRollout, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the tokens are those of the completion, after its prompt or alone."""
    if max(rollout.tokens) >= len(tokenizer):
        return False
    prompt = tokenizer(rollout.prompt)["input_ids"]
    # Most samplers decode a completion alone, which loses a first space with some tokenizers.
    return any(
        decode_tokens(tokenizer, rollout.tokens, before=before, skip_special_tokens=True)
        == rollout.completion
        for before in (prompt, ())
    )
