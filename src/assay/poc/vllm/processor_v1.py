"""The logits processor of vLLM's V1 model runner, which the CPU build has: 0.28 to 0.32.

It runs before vLLM's penalties and temperature, of which a seeded request has none left, and after the mask of a
grammar, the allowed ids and the words that are forbidden. What it returns are scores with the noise in them, and vLLM,
which was told temperature 0, takes the largest: that token *is* the sample.

Shapes: N seeded rows of a step, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from assay import streams
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.sampling import Sampling
from assay.poc.vllm.response_worker import Carried, carried_by


class History:
    """Which tokens the prompts have, and how often the outputs have each token so far.

    Args:
        prompts: Token ids of every prompt.
        vocab_size: Number V of tokens of the vocabulary.
        device: Device of the logits.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._prompt_NV = torch.zeros((len(prompts), vocab_size), dtype=torch.bool, device=device)
        self._counts_NV = torch.zeros((len(prompts), vocab_size), dtype=torch.int32, device=device)
        self._lengths = [0] * len(prompts)
        rows, tokens = self._places(list(enumerate(prompts)))
        self._prompt_NV[rows, tokens] = True

    def update(self, outputs: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Count the tokens that are new since the last call; return what a ``Sampler`` takes."""
        new = [(row, output[length:]) for row, (output, length) in enumerate(zip(outputs, self._lengths, strict=True))]
        self._lengths = [len(output) for output in outputs]
        rows, tokens = self._places(new)
        if len(rows):
            self._counts_NV.index_put_((rows, tokens), torch.ones_like(rows, dtype=torch.int32), accumulate=True)
        return {"prompt_NV": self._prompt_NV, "counts_NV": self._counts_NV}

    def _places(self, listed: Sequence[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor]:
        # Tokens that are not there yet have negative ids, and a prompt may have ids that no logit stands for.
        pairs = [(row, token) for row, tokens in listed for token in tokens if 0 <= token < self._vocab_size]
        places = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(self._device, non_blocking=True)
        return places[:, 0], places[:, 1]


@dataclass
class Row:
    """One seeded request of the batch; vLLM appends to ``output`` as tokens come."""

    carried: Carried
    prompt: list[int]
    output: list[int]


@dataclass
class Batch:
    """What stays the same while the seeded requests of the batch do."""

    height: int
    """Rows of the logits, those of other requests included."""
    rows: list[Row]
    places: Tensor | None
    """Rows of the logits, int64 [N]; None if they are all."""
    words: Tensor
    """Words of the streams, uint32 [N, 8]."""
    sampler: Sampler
    history: History | None


class ProcessorV1(LogitsProcessor):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = torch.device(device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._rows: dict[int, Row] = {}
        self._batch: Batch | None = None

    def is_argmax_invariant(self) -> bool:
        """Return False: the noise decides which token is the largest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that came, went and moved."""
        if process_dict_updates(self._rows, batch_update, _row):
            self._batch = None

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits with scores in the rows of seeded requests."""
        if not self._rows:
            return logits
        batch = self._batch
        if batch is None or batch.height != len(logits):
            batch = self._batch = self._made(*logits.shape)
        l_NV = logits if batch.places is None else logits.index_select(0, batch.places)
        seen = {} if batch.history is None else batch.history.update([row.output for row in batch.rows])
        steps_N = torch.tensor([len(row.output) for row in batch.rows]).to(self._device, non_blocking=True)
        seeds_N = self._streams.row_seeds(batch.words, steps_N)
        s_NV = batch.sampler.add_noise(batch.sampler.penalise(l_NV, **seen), seeds_N, in_place=True)
        return s_NV if batch.places is None else logits.index_copy_(0, batch.places, s_NV)

    def _made(self, height: int, vocab_size: int) -> Batch:
        found = sorted(self._rows)
        rows = [self._rows[place] for place in found]
        samplings = [row.carried.sampling or Sampling() for row in rows]
        sampler = Sampler(samplings, vocab_size, self._device)
        history = History([row.prompt for row in rows], vocab_size, self._device) if sampler.penalises else None
        words = torch.tensor([row.carried.tokens for row in rows], dtype=torch.uint32)
        return Batch(
            height=height,
            rows=rows,
            places=None if len(found) == height else torch.tensor(found).to(self._device, non_blocking=True),
            words=words.to(self._device, non_blocking=True),
            sampler=sampler,
            history=history,
        )


def _row(params: Any, prompt: list[int] | None, output: list[int]) -> Row | None:
    carried = carried_by(params)
    if carried is None or carried.tokens is None or prompt is None:
        return None
    return Row(carried, prompt, output)
