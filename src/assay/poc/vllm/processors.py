"""Logits processors of vLLM's two model runners: scores with noise for seeded requests.

A seeded request was told temperature 0, so that vLLM takes the largest score: that token *is* the
sample. Its bias, penalties and filters were taken from it; grammars, allowed ids and forbidden
words act before the processor.

The V1 runner, which the CPU build has, calls :class:`ProcessorV1`, and the V2 runner, the default
on GPUs, :class:`ProcessorV2`. With drafts a request has a row for every draft token there, and
vLLM's rejection sampler accepts a draft if it is the largest score of its row: with any drafter, or
with none, the tokens are the same. Nothing there waits for the device. A small model's step takes
as long on the host as on the device, so V2 lays parameters out only when the batch changes. Which
step a request is at, the device knows by the position of its row.

Shapes: R rows of logits, N requests of a step, M slots of requests, V tokens of the vocabulary.
"""

from collections.abc import Sequence
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

UNSEEDED = SeedArgument(0, (0,) * 8, (0,) * 8, UNTOUCHED)
"""What stands for a request that is not seeded beside those that are."""

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


class ProcessorV1(LogitsProcessor):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = torch.device(device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: the noise decides which token is the largest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that came, went and moved."""
        process_dict_updates(self._rows, batch_update, Row.of)

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits with scores in the rows of seeded requests."""
        if not self._rows:
            return logits
        vocab_size = logits.shape[1]
        rows = self._rows.values()
        sampler = Sampler(
            [row.carried.sampling or UNTOUCHED for row in rows], vocab_size, self._device
        )
        history = {}
        if sampler.penalises:
            prompts_NV = count_tokens([row.prompt for row in rows], vocab_size, self._device)
            counts_NV = count_tokens([row.output for row in rows], vocab_size, self._device)
            history = {"prompt_NV": prompts_NV > 0, "counts_NV": counts_NV}
        words = torch.tensor([row.carried.tokens for row in rows], dtype=torch.uint32)
        steps = torch.tensor([len(row.output) for row in rows])
        seeds_N = self._streams.row_seeds(
            to_device(words, self._device), to_device(steps, self._device)
        )
        places_N = to_device(list(self._rows), self._device)
        l_NV = sampler.penalise(logits.index_select(0, places_N), **history)
        return logits.index_copy_(0, places_N, sampler.add_noise(l_NV, seeds_N, in_place=True))


class BatchV2(NamedTuple):
    """What a step needs to know of its requests, for as long as these stay the same."""

    slots: NDArray[np.int64]  # of the requests in the order of the step, [N]
    sampler: Sampler
    words: Tensor  # of the stream of each, [N, 8]
    firsts: Tensor  # positions [N] that give their first tokens


class ProcessorV2(LogitsProcessorV2):  # type: ignore[misc]
    """Turns the logits of seeded requests into scores, whose largest is the sample."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._device = torch.device(req_states.device)
        self._streams = streams.get_backend("auto", str(self._device))
        self._seeded: dict[int, SeedArgument] = {}  # by slot
        self._batch: BatchV2 | None = None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot's new request; return whether its logits change."""
        self._batch = None
        carried = read_seed_argument(sampling_params)
        if carried is None or carried.tokens is None:
            self._seeded.pop(req_idx, None)
            return False
        self._seeded[req_idx] = carried
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits [R, V] with scores in seeded rows, in place where possible."""
        slots_N = ctx.idx_mapping_np
        if self._batch is None or not np.array_equal(slots_N, self._batch.slots):
            if self._seeded.keys().isdisjoint(slots_N.tolist()):
                return logits
            self._batch = self._made(slots_N, logits.shape[1])
        batch = self._batch
        if len(logits) != len(slots_N):
            batch = self._by_row(batch, ctx)
        sampler = batch.sampler
        seeds_R = self._streams.row_seeds(batch.words, ctx.pos - batch.firsts)
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
        carried = [self._seeded.get(slot, UNSEEDED) for slot in slots_N.tolist()]
        samplings = [request.sampling or UNTOUCHED for request in carried]
        words_N8 = np.array([request.tokens for request in carried], np.uint32)
        firsts_N = np.array([request.prompt - 1 for request in carried])
        return BatchV2(
            slots=slots_N.copy(),
            sampler=Sampler(samplings, vocab_size, self._device),
            words=to_device(words_N8.view(np.int32), self._device),
            firsts=to_device(firsts_N, self._device),
        )

    def _by_row(self, batch: BatchV2, ctx: Any) -> BatchV2:
        """Return the batch of all rows of a step with drafts. Only the device knows which request a
        row belongs to.
        """
        order_M = torch.zeros(self._states.max_num_reqs, dtype=torch.int64, device=self._device)
        order_M[ctx.idx_mapping.long()] = torch.arange(len(batch.slots), device=self._device)
        index_R = order_M[ctx.expanded_idx_mapping.long()]
        return batch._replace(
            sampler=batch.sampler.rows(index_R),
            words=batch.words.index_select(0, index_R),
            firsts=batch.firsts.index_select(0, index_R),
        )

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
