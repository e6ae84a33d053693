"""Logits processors of vLLM's two model runners: scores with noise for seeded requests.

A seeded request was told temperature 0, so that vLLM takes the largest score: that token *is* the
sample. Its bias, penalties and filters were taken from it; grammars, allowed ids and forbidden
words act before the processor.

The V1 runner, which the CPU build has, calls :class:`ProcessorV1`, and the V2 runner, the default
on GPUs, :class:`ProcessorV2`. With drafts a request has a row for every draft token there, and
vLLM's rejection sampler accepts a draft if it is the largest score of its row: with any drafter, or
with none, the tokens are the same. Nothing there waits for the device. A small model's step takes
as long on the host as on the device, so parameters are laid out only when the batch changes, and go
to the device in one copy. Without drafts the host knows which step a request is at, and seeds are
made for several steps at once. With drafts only the device does.

Shapes: R rows of logits, N requests of a step, M slots of requests, V tokens of the vocabulary, A
    steps ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from assay import streams
from assay.models.device import to_device
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.sampling import Sampling
from assay.poc.vllm.response_worker import SeedArgument, read_seed_argument

UNTOUCHED = Sampling(temperature=0.0)
"""Parameters that leave the logits of a row as they are, for requests that are not seeded."""

# Steps whose seeds are made at once: as many as a batch may well stay the same for.
AHEAD = 16
MOST_VALUES = 2**24
"""Scores that are made at once: sorting takes several times their memory, and vLLM leaves little of
a GPU free.
"""


def count_tokens(listed: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Return how often each list has each token, int32 [N, V].

    Tokens that are not there yet have negative ids, and a prompt may have ids that no logit stands
    for.
    """
    rows = [np.asarray(tokens, np.int64) for tokens in listed]
    counts = [
        np.bincount(ids[(ids >= 0) & (ids < vocab_size)], minlength=vocab_size) for ids in rows
    ]
    return to_device(np.stack(counts).astype(np.int32), device)


class Row(NamedTuple):
    """One seeded request of the batch; vLLM appends to ``output`` as tokens come."""

    carried: SeedArgument
    prompt: list[int]
    output: list[int]

    @classmethod
    def of(cls, params: Any, prompt: list[int] | None, output: list[int]) -> "Row | None":
        """Return the row of a new request; None where it is not seeded."""
        carried = read_seed_argument(params)
        return (
            None
            if carried is None or carried.tokens is None or prompt is None
            else cls(carried, prompt, output)
        )


class BatchV1(NamedTuple):
    """What stays the same while the seeded requests of the batch do."""

    height: int  # rows of the logits, those of other requests included
    rows: list[Row]
    places: Tensor | None  # rows of the logits, int64 [N]; None if they are all
    words: Tensor  # of the streams, uint32 [N, 8]
    sampler: Sampler
    prompts: Tensor | None  # whether a prompt has a token, [N, V]; None where that changes nothing


class ProcessorV1(LogitsProcessor):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = torch.device(device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._rows: dict[int, Row] = {}
        self._batch: BatchV1 | None = None

    def is_argmax_invariant(self) -> bool:
        """Return False: the noise decides which token is the largest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that came, went and moved."""
        if process_dict_updates(self._rows, batch_update, Row.of):
            self._batch = None

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits with scores in the rows of seeded requests."""
        if not self._rows:
            return logits
        batch = self._batch
        if batch is None or batch.height != len(logits):
            batch = self._batch = self._made(*logits.shape)
        l_NV = logits if batch.places is None else logits.index_select(0, batch.places)
        history = {}
        if batch.prompts is not None:
            outputs = [row.output for row in batch.rows]
            history = {
                "prompt_NV": batch.prompts,
                "counts_NV": count_tokens(outputs, logits.shape[1], self._device),
            }
        steps_N = torch.tensor([len(row.output) for row in batch.rows]).to(
            self._device, non_blocking=True
        )
        seeds_N = self._streams.row_seeds(batch.words, steps_N)
        s_NV = batch.sampler.add_noise(
            batch.sampler.penalise(l_NV, **history), seeds_N, in_place=True
        )
        return s_NV if batch.places is None else logits.index_copy_(0, batch.places, s_NV)

    def _made(self, height: int, vocab_size: int) -> BatchV1:
        row_places = sorted(self._rows)
        rows = [self._rows[place] for place in row_places]
        samplings = [row.carried.sampling or Sampling() for row in rows]
        sampler = Sampler(samplings, vocab_size, self._device)
        prompts = [row.prompt for row in rows]
        words = torch.tensor([row.carried.tokens for row in rows], dtype=torch.uint32)
        return BatchV1(
            height=height,
            rows=rows,
            places=None
            if len(row_places) == height
            else torch.tensor(row_places).to(self._device, non_blocking=True),
            words=words.to(self._device, non_blocking=True),
            sampler=sampler,
            prompts=count_tokens(prompts, vocab_size, self._device) > 0
            if sampler.penalises
            else None,
        )


@dataclass
class BatchV2:
    """What the rows of a step need to know of their requests, for as long as these stay the
    same.
    """

    slots: NDArray[np.int64]  # of the requests in the order of the step, [N]
    sampler: Sampler
    begun: NDArray[np.int64] | None = (
        None  # lengths [N] of the requests at which the first of `seeds` is due
    )
    # Seeds of that step and of the following ones, int32 [N] with the bits of uint32.
    seeds: tuple[Tensor, ...] = ()
    words: Tensor | None = None  # with drafts, of the stream of each row, [R, 8]
    firsts: Tensor | None = None  # with drafts, the positions [R] that give the first tokens


class ProcessorV2(LogitsProcessorV2):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._device = torch.device(req_states.device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._drafts = getattr(vllm_config, "speculative_config", None) is not None
        slots = req_states.max_num_reqs
        self._seeded_M = np.zeros(slots, bool)
        self._samplings = [UNTOUCHED] * slots
        self._words_M8 = np.zeros((slots, 8), np.uint32)
        self._prompts_M = np.zeros(slots, np.int64)
        self._batch: BatchV2 | None = None
        self._host_streams = streams.get_backend("auto", "cpu")

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot's new request; return whether its logits change."""
        carried = read_seed_argument(sampling_params)
        seeded = carried is not None and carried.tokens is not None
        self._batch = None
        self._seeded_M[req_idx] = seeded
        self._samplings[req_idx] = UNTOUCHED
        if carried is not None and carried.tokens is not None:
            self._samplings[req_idx] = carried.sampling or UNTOUCHED
            self._words_M8[req_idx] = carried.tokens
            self._prompts_M[req_idx] = carried.prompt
        return seeded

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits [R, V] with scores in seeded rows, in place where possible."""
        slots_N = ctx.idx_mapping_np
        batch = self._batch
        if batch is None or not np.array_equal(slots_N, batch.slots):
            if not self._seeded_M[slots_N].any():
                return logits
            batch = self._batch = self._made(slots_N, logits.shape[1])
        if self._drafts:
            batch, seeds_R = self._by_position(batch, len(logits), ctx)
        else:
            seeds_R = self._by_length(batch, ctx.seq_lens_upper_bound_np[: len(slots_N)])
        sampler = batch.sampler
        history = self._seen(ctx, logits.shape[1]) if sampler.penalises else {}
        at_once = max(1, MOST_VALUES // logits.shape[1])
        if len(logits) <= at_once:
            return sampler.add_noise(sampler.penalise(logits, **history), seeds_R, in_place=True)
        for start in range(0, len(logits), at_once):
            rows = slice(start, start + at_once)
            part = sampler.rows(torch.arange(len(logits), device=self._device)[rows])
            l_RV = part.penalise(
                logits[rows], **{name: values[rows] for name, values in history.items()}
            )
            logits[rows] = part.add_noise(l_RV, seeds_R[rows])
        return logits

    def _made(self, slots_N: NDArray[np.int64], vocab_size: int) -> BatchV2:
        sampler = Sampler([self._samplings[slot] for slot in slots_N], vocab_size, self._device)
        batch = BatchV2(slots_N.copy(), sampler)
        if self._drafts:
            batch.words = to_device(self._words_M8[slots_N].view(np.int32), self._device)
            batch.firsts = to_device(self._prompts_M[slots_N] - 1, self._device)
        return batch

    def _by_length(self, batch: BatchV2, lengths_N: NDArray[Any]) -> Tensor:
        """Return the seeds of a step without drafts, whose requests have so many tokens: all but
        the one to come.
        """
        ahead = -1 if batch.begun is None else int(lengths_N[0] - batch.begun[0])
        if (
            batch.begun is None
            or not 0 <= ahead < AHEAD
            or not np.array_equal(lengths_N, batch.begun + ahead)
        ):
            steps_AN = lengths_N - self._prompts_M[batch.slots] + np.arange(AHEAD)[:, None]
            words = np.tile(self._words_M8[batch.slots], (AHEAD, 1))
            made = self._host_streams.row_seeds(words, steps_AN.ravel().astype(np.uint32))
            batch.seeds = to_device(
                made.view(torch.int32).view(steps_AN.shape), self._device
            ).unbind()
            batch.begun = lengths_N.copy()
            ahead = 0
        return batch.seeds[ahead]

    def _by_position(self, batch: BatchV2, rows: int, ctx: Any) -> tuple[BatchV2, Tensor]:
        """Return the batch and the seeds of all rows of a server with drafts: the device knows
        which are accepted.
        """
        assert batch.words is not None
        assert batch.firsts is not None
        # Which request a row belongs to is known there, too.
        if rows != len(batch.slots):
            order_M = torch.zeros(len(self._seeded_M), dtype=torch.int64, device=self._device)
            order_M[ctx.idx_mapping.long()] = torch.arange(len(batch.slots), device=self._device)
            index_R = order_M[ctx.expanded_idx_mapping.long()]
            words = batch.words.index_select(0, index_R)
            firsts = batch.firsts.index_select(0, index_R)
            return replace(batch, sampler=batch.sampler.rows(index_R)), self._streams.row_seeds(
                words, ctx.pos - firsts
            )
        return batch, self._streams.row_seeds(batch.words, ctx.pos - batch.firsts)

    def _seen(self, ctx: Any, vocab_size: int) -> dict[str, Tensor]:
        """Return the tokens of the prompt of every row, and its output so far: committed tokens,
        and drafts before.
        """
        states = self._states
        slots_R = ctx.expanded_idx_mapping.long()
        longest = int(ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)].max())
        all_ids = states.all_token_ids.gpu[slots_R, :longest].long()
        ids = all_ids.clamp(0, vocab_size - 1)
        # A prompt may have ids that no logit stands for.
        is_token = all_ids == ids
        places = torch.arange(ids.shape[1], device=self._device)
        in_prompt = places < states.prompt_len.gpu[slots_R].unsqueeze(1)
        committed = places < states.total_len.gpu[slots_R].unsqueeze(1)
        shape = (len(slots_R), vocab_size)
        prompt_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        prompt_RV.scatter_add_(1, ids, (in_prompt & is_token).int())
        counts_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        counts_RV.scatter_add_(1, ids, (committed & ~in_prompt & is_token).int())
        drafts = len(slots_R) - len(ctx.idx_mapping_np)
        # The rows of a request lie one after the other, its drafts in the rows behind the first.
        for back in range(drafts):
            tokens_R1 = ctx.input_ids.long().roll(back).clamp(0, vocab_size - 1).unsqueeze(1)
            counts_RV.scatter_add_(1, tokens_R1, (ctx.expanded_local_pos > back).int().unsqueeze(1))
        return {"prompt_NV": prompt_RV > 0, "counts_NV": counts_RV}
