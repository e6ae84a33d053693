r"""A teacher pool: stored completions with the log-probabilities they were sampled with.

A file is JSON Lines, one rollout per line::

    {"prompt": "# Task: …", "completion": "    return x\n…", "tokens": [81, …], "logprobs": [-0.1, …]}

``tokens`` are those of the completion by the tokenizer of the model that is trained; ``logprobs``
their natural log-probabilities under the distribution that the completion was sampled from,
temperature and all.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from assay.errors import DataError
from assay.files.jsonl import read_jsonl
from assay.files.storage import write_jsonl
from assay.vhack.pairs.pairs import validated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        """Return up to ``count`` different completions of a prompt; equal keys give equal
        choices.
        """
        found = self._by_prompt.get(prompt, [])
        return random.Random(f"pool {key} {prompt}").sample(found, min(count, len(found)))

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
        """Read a pool file for the tokenizer of the trained model; without it, only what needs none
        is checked.

        Raises:
            DataError: The file cannot be read, or a rollout is malformed, of another tokenizer, or
                longer than the trainer accepts, for TRL does not cut longer ones; the message names
                the line.
        """
        wanted = '{"prompt": …, "completion": …, "tokens": […], "logprobs": […]}, a log-probability for every token'
        found = []
        for number, record in read_jsonl(path):
            name = f"{path}, line {number}"
            try:
                made = validated(PoolRollout, record)
            except ValueError as error:
                raise DataError(f"{name}: {error}", wanted=wanted, do="correct the line") from None
            tokens, ids = len(made.tokens), list(made.tokens)
            spells = tokenizer is None or (
                max(ids) < len(tokenizer)
                and tokenizer.decode(ids, skip_special_tokens=True) == made.completion
            )
            for is_good, seen, asked in (
                (
                    tokens == len(made.logprobs),
                    f"{tokens} tokens and {len(made.logprobs)} log-probabilities",
                    wanted,
                ),
                (
                    spells,
                    "tokens that do not spell the completion",
                    "tokens of the tokenizer of the trained model",
                ),
                (
                    tokens <= max_new_tokens,
                    f"a completion of {tokens} tokens",
                    f"at most {max_new_tokens}",
                ),
            ):
                if not is_good:
                    raise DataError(
                        f"{name}: {seen}", wanted=asked, do="correct the line, or leave it out"
                    )
            found.append(made)
        if not found:
            raise DataError(f"{path}: no rollout", wanted="at least one line", do="check the path")
        return cls(found)
