"""The logits processor of vLLM's V2 model runner, the default on GPUs: 0.31 and newer.

It runs after vLLM's bias, penalties, forbidden words and grammar, and before its temperature and filters; a seeded
request has none of them left but the masks. With drafts a request has a row for every draft token, and vLLM's rejection
sampler, which was told temperature 0, accepts a draft if it is the largest score of its row: with any drafter, or with
none, the tokens are the same. Nothing here waits for the device.

A small model's step takes as long on the host as on the device, so what is done here must be little. Parameters lie in
arrays by slot, are laid out again when the batch changes, and go to the device in one copy. Without drafts the host
knows which step a request is at, and seeds are made for several steps at once. With drafts only the device does.

Shapes: R rows of logits, N requests of a step, M slots of requests, V tokens of the vocabulary, A steps ahead.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from assay import streams
from assay.poc.responses.sampler import NUMBERS, Sampler, numbers_of, to_device
from assay.poc.responses.sampling import Sampling
from assay.poc.vllm.response_worker import carried_by

UNTOUCHED = Sampling(temperature=0.0)
"""Parameters that leave the logits of a row as they are, for requests that are not seeded."""

AHEAD = 16
"""Steps whose seeds are made at once: as many as a batch may well stay the same for."""

MOST_VALUES = 2**24
"""Scores that are made at once: sorting takes several times their memory, and vLLM leaves little of a GPU free."""


@dataclass
class Batch:
    """What the rows of a step need to know of their requests, for as long as these stay the same.

    Args:
        slots: Slots of the requests in the order of the step, [N].
        sampler: Parameters of every row.
        begun: Lengths [N] of the requests at which the first of ``seeds`` is due.
        seeds: Seeds of that step and of those that follow, on the device, int32 [N] with the bits of uint32.
        words: With drafts, the words of the stream of each row, [R, 8].
        firsts: With drafts, the position [R] of each row's request that gives its first token.
    """

    slots: NDArray[np.int64]
    sampler: Sampler
    begun: NDArray[np.int64] | None = None
    seeds: tuple[Tensor, ...] = ()
    words: Tensor | None = None
    firsts: Tensor | None = None

    def rows(self, index_R: Tensor) -> "Batch":
        """Return the batch of other rows: row i of it is of the request ``index_R[i]`` here."""
        assert self.words is not None
        assert self.firsts is not None
        words, firsts = (values.index_select(0, index_R) for values in (self.words, self.firsts))
        return replace(self, sampler=self.sampler.rows(index_R), words=words, firsts=firsts)


class ProcessorV2(LogitsProcessor):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._device = torch.device(req_states.device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._drafts = getattr(vllm_config, "speculative_config", None) is not None
        slots = req_states.max_num_reqs
        self._seeded_M = np.zeros(slots, bool)
        self._numbers_M8 = np.full((slots, NUMBERS), numbers_of(UNTOUCHED), np.float64)
        self._biases: list[dict[int, float]] = [{}] * slots
        self._words_M8 = np.zeros((slots, 8), np.uint32)
        self._prompts_M = np.zeros(slots, np.int64)
        self._batch: Batch | None = None
        self._host_streams = streams.get_backend("auto", "cpu")
        self._host_streams.row_seeds(self._words_M8[:1], self._prompts_M[:1])  # compiles what the first step needs

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot's new request; return whether its logits change."""
        carried = carried_by(sampling_params)
        seeded, sampling, prompt = False, UNTOUCHED, 0
        words: tuple[int, ...] = (0,) * 8
        if carried is not None and carried.tokens is not None:
            seeded, sampling, words, prompt = True, carried.sampling or UNTOUCHED, carried.tokens, carried.prompt
        self._seeded_M[req_idx], self._words_M8[req_idx], self._prompts_M[req_idx] = seeded, words, prompt
        self._numbers_M8[req_idx], self._biases[req_idx] = numbers_of(sampling), dict(sampling.logit_bias)
        self._batch = None
        return seeded

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits [R, V] with scores in the rows of seeded requests, in their own memory where that goes."""
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
        seen = self._seen(ctx, logits.shape[1]) if sampler.penalises else {}
        at_once = max(1, MOST_VALUES // logits.shape[1])
        if len(logits) <= at_once:
            return sampler.add_noise(sampler.penalise(logits, **seen), seeds_R, in_place=True)
        for start in range(0, len(logits), at_once):
            rows = slice(start, start + at_once)
            part = sampler.rows(torch.arange(len(logits), device=self._device)[rows])
            l_RV = part.penalise(logits[rows], **{name: values[rows] for name, values in seen.items()})
            logits[rows] = part.add_noise(l_RV, seeds_R[rows])
        return logits

    def _made(self, slots_N: NDArray[np.int64], vocab_size: int) -> Batch:
        biases = [self._biases[slot] for slot in slots_N]
        sampler = Sampler(self._numbers_M8[slots_N], vocab_size, self._device, biases=biases if any(biases) else ())
        batch = Batch(slots_N.copy(), sampler)
        if self._drafts:
            batch.words = to_device(self._words_M8[slots_N].view(np.int32), self._device)
            batch.firsts = to_device(self._prompts_M[slots_N] - 1, self._device)
        return batch

    def _by_length(self, batch: Batch, lengths_N: NDArray[Any]) -> Tensor:
        """Return the seeds of a step without drafts, whose requests have so many tokens: all but the one to come."""
        ahead = -1 if batch.begun is None else int(lengths_N[0] - batch.begun[0])
        if batch.begun is None or not 0 <= ahead < AHEAD or not np.array_equal(lengths_N, batch.begun + ahead):
            steps_AN = lengths_N - self._prompts_M[batch.slots] + np.arange(AHEAD)[:, None]
            words = np.tile(self._words_M8[batch.slots], (AHEAD, 1))
            made = self._host_streams.row_seeds(words, steps_AN.ravel().astype(np.uint32))
            batch.seeds = to_device(made.view(torch.int32).view(steps_AN.shape), self._device).unbind()
            batch.begun, ahead = lengths_N.copy(), 0
        return batch.seeds[ahead]

    def _by_position(self, batch: Batch, rows: int, ctx: Any) -> tuple[Batch, Tensor]:
        """Return the batch and the seeds of all rows of a server with drafts: the device knows which are accepted."""
        if rows != len(batch.slots):  # which request a row belongs to is known there, too
            order_M = torch.zeros(len(self._seeded_M), dtype=torch.int64, device=self._device)
            order_M[ctx.idx_mapping.long()] = torch.arange(len(batch.slots), device=self._device)
            batch = batch.rows(order_M[ctx.expanded_idx_mapping.long()])
        assert batch.words is not None
        return batch, self._streams.row_seeds(batch.words, ctx.pos - batch.firsts)

    def _seen(self, ctx: Any, vocab_size: int) -> dict[str, Tensor]:
        """Return the tokens of the prompt of every row, and its output so far: committed tokens, and drafts before."""
        states, slots_R = self._states, ctx.expanded_idx_mapping.long()
        longest = int(ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)].max())
        given = states.all_token_ids.gpu[slots_R, :longest].long()
        ids = given.clamp(0, vocab_size - 1)
        known = given == ids  # a prompt may have ids that no logit stands for
        places = torch.arange(ids.shape[1], device=self._device)
        in_prompt = places < states.prompt_len.gpu[slots_R].unsqueeze(1)
        committed = places < states.total_len.gpu[slots_R].unsqueeze(1)
        shape = (len(slots_R), vocab_size)
        prompt_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        prompt_RV.scatter_add_(1, ids, (in_prompt & known).int())
        counts_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        counts_RV.scatter_add_(1, ids, (committed & ~in_prompt & known).int())
        drafts = len(slots_R) - len(ctx.idx_mapping_np)
        # The rows of a request lie one after the other, its drafts in the rows behind the first.
        for back in range(drafts):
            tokens_R1 = ctx.input_ids.long().roll(back).clamp(0, vocab_size - 1).unsqueeze(1)
            counts_RV.scatter_add_(1, tokens_R1, (ctx.expanded_local_pos > back).int().unsqueeze(1))
        return {"prompt_NV": prompt_RV > 0, "counts_NV": counts_RV}
