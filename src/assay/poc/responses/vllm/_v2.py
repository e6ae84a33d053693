"""The logits processor of vLLM's V2 model runner, the default on GPUs: 0.31 and newer.

It runs after vLLM's bias, penalties, forbidden words and grammar, and before its temperature and filters; a seeded
request has none of them left but the masks. With drafts a request has a row for every draft token, and vLLM's rejection
sampler, which was told temperature 0, accepts a draft if it is the largest score of its row: with any drafter, or with
none, the tokens are the same. Nothing here waits for the device: which request a row belongs to, and which step it is
at, is known there only.

Shapes: R rows of logits, N requests of a step, M slots of requests, V tokens of the vocabulary, K words of a stream.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor  # type: ignore[import-not-found]

from assay import streams
from assay.poc.responses._sampler import Sampler
from assay.poc.responses._sampling import Sampling
from assay.poc.responses.vllm._carried import Carried, carried_by

UNTOUCHED = Sampling(temperature=0.0)
"""Parameters that leave the logits of a row as they are, for requests that are not seeded."""

MOST_VALUES = 2**24
"""Scores that are made at once: sorting takes several times their memory, and vLLM leaves little of a GPU free."""


@dataclass(frozen=True)
class Batch:
    """What the rows of a step need to know of their requests.

    Args:
        carried: What each request carries; None for one that is not seeded.
        sampler: Parameters of every row.
        words: Words of the stream of each row, [R, 8].
        firsts: Position [R] of each row's request that gives its first token; 0 where it is not seeded.
    """

    carried: list[Carried | None]
    sampler: Sampler
    words: Tensor
    firsts: Tensor

    def is_of(self, carried: list[Carried | None]) -> bool:
        """Return whether these are the very same requests in the same order."""
        return len(carried) == len(self.carried) and all(a is b for a, b in zip(carried, self.carried, strict=True))

    def rows(self, index_R: Tensor) -> "Batch":
        """Return the batch of other rows: row i of it is of the request ``index_R[i]`` here."""
        words, firsts = (values.index_select(0, index_R) for values in (self.words, self.firsts))
        return replace(self, sampler=self.sampler.rows(index_R), words=words, firsts=firsts)


class ProcessorV2(LogitsProcessor):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._device = torch.device(req_states.device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._carried: list[Carried | None] = [None] * req_states.max_num_reqs
        self._batch: Batch | None = None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot's new request; return whether its logits change."""
        carried = carried_by(sampling_params)
        if carried is not None and carried.tokens is None:
            carried = None
        self._carried[req_idx] = carried
        return carried is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits [R, V] with scores in the rows of seeded requests."""
        carried = [self._carried[slot] for slot in ctx.idx_mapping_np]
        if not any(carried):
            return logits
        if self._batch is None or not self._batch.is_of(carried):  # mostly it is that of the last step
            self._batch = self._made(carried, logits.shape[1])
        batch = self._batch
        if len(logits) != len(carried):  # drafts: which request a row belongs to is known on the device only
            order_M = torch.zeros(len(self._carried), dtype=torch.int64, device=self._device)
            order_M[ctx.idx_mapping.long()] = torch.arange(len(carried), device=self._device)
            batch = batch.rows(order_M[ctx.expanded_idx_mapping.long()])
        sampler = batch.sampler
        seeds_R = self._streams.row_seeds(batch.words, ctx.pos - batch.firsts)
        seen = self._seen(ctx, logits.shape[1]) if sampler.penalises else {}
        at_once = max(1, MOST_VALUES // logits.shape[1])
        if len(logits) <= at_once:
            return sampler.noisy(sampler.penalised(logits, **seen), seeds_R)
        for start in range(0, len(logits), at_once):
            rows = slice(start, start + at_once)
            part = sampler.rows(torch.arange(len(logits), device=self._device)[rows])
            l_RV = part.penalised(logits[rows], **{name: values[rows] for name, values in seen.items()})
            logits[rows] = part.noisy(l_RV, seeds_R[rows])
        return logits

    def _made(self, carried: list[Carried | None], vocab_size: int) -> Batch:
        samplings = [UNTOUCHED if one is None else one.sampling or UNTOUCHED for one in carried]
        words = [(0,) * 8 if one is None or one.tokens is None else one.tokens for one in carried]
        firsts = [0 if one is None else one.prompt - 1 for one in carried]
        return Batch(
            carried=carried,
            sampler=Sampler(samplings, vocab_size, self._device),
            words=self._put(np.array(words, np.uint32).view(np.int32)),
            firsts=self._put(np.array(firsts, np.int64)),
        )

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
        for back in range(
            drafts
        ):  # the rows of a request lie one after the other, its drafts in the rows behind the first
            tokens_R1 = ctx.input_ids.long().roll(back).clamp(0, vocab_size - 1).unsqueeze(1)
            counts_RV.scatter_add_(1, tokens_R1, (ctx.expanded_local_pos > back).int().unsqueeze(1))
        return {"prompt_NV": prompt_RV > 0, "counts_NV": counts_RV}

    def _put(self, values: Any) -> Tensor:
        """Copy values to the device without waiting for it."""
        made = torch.as_tensor(values)
        if self._device.type == "cuda":
            made = made.pin_memory()
        return made.to(self._device, non_blocking=True)
