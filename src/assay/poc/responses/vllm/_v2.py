"""The logits processor of vLLM's V2 model runner, the default on GPUs: 0.31 and newer.

It runs after vLLM's bias, penalties, forbidden words and grammar, and before its temperature and filters; a seeded
request has none of them left but the masks. With drafts a request has a row for every draft token, and vLLM's rejection
sampler, which was told temperature 0, accepts a draft if it is the largest score of its row: with any drafter, or with
none, the tokens are the same. Nothing here waits for the device: which request a row belongs to, and which step it is
at, is known there only.

Shapes: R rows of logits, N requests of a step, M slots of requests, V tokens of the vocabulary, K words of a stream.
"""

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


class ProcessorV2(LogitsProcessor):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._device = torch.device(req_states.device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._carried: list[Carried | None] = [None] * req_states.max_num_reqs
        self._words_MK = torch.zeros((req_states.max_num_reqs, 8), dtype=torch.int32, device=self._device)
        self._staged: dict[int, Carried] = {}
        speculative = getattr(vllm_config, "speculative_config", None)
        self._drafts = int(speculative.num_speculative_tokens or 0) if speculative is not None else 0
        self._made: tuple[list[Carried | None], Sampler] | None = None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot's new request; return whether its logits change."""
        carried = carried_by(sampling_params)
        if carried is not None and carried.tokens is None:
            carried = None
        self._carried[req_idx] = carried
        if carried is not None:
            self._staged[req_idx] = carried
        return carried is not None

    def apply_staged_writes(self) -> None:
        """Copy the words of new requests to the device."""
        if not self._staged:
            return
        words = np.array([carried.tokens for carried in self._staged.values()], np.uint32).view(np.int32)
        self._words_MK.index_copy_(0, self._put(list(self._staged)), self._put(words))
        self._staged.clear()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits [R, V] with scores in the rows of seeded requests."""
        carried = [self._carried[slot] for slot in ctx.idx_mapping_np]
        if not any(carried):
            return logits
        slots_R = ctx.expanded_idx_mapping
        sampler = self._sampler(carried, logits.shape[1])
        if len(slots_R) != len(carried):  # drafts: which request a row belongs to is known on the device only
            order_M = torch.zeros(len(self._carried), dtype=torch.int64, device=self._device)
            order_M[ctx.idx_mapping.long()] = torch.arange(len(carried), device=self._device)
            sampler = sampler.rows(order_M[slots_R.long()])
        steps_R = (ctx.pos + 1 - self._states.prompt_len.gpu[slots_R.long()]).clamp(min=0)
        seeds_R = self._streams.row_seeds(self._words_MK[slots_R.long()], steps_R.long())
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

    def _sampler(self, carried: list[Carried | None], vocab_size: int) -> Sampler:
        """Return the parameters of the requests of a step, which are those of the last step more often than not."""
        same = self._made is not None and len(self._made[0]) == len(carried)
        if not same or any(a is not b for a, b in zip(self._made[0], carried, strict=True)):  # type: ignore[index]
            samplings = [UNTOUCHED if one is None else one.sampling or UNTOUCHED for one in carried]
            self._made = carried, Sampler(samplings, vocab_size, self._device)
        assert self._made is not None
        return self._made[1]

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
