"""Decoding inside vLLM's workers: noise for the tokens of nonces, and what is published or compared of their states.

A nonce that decodes is a request with a drawn prompt. With every step of the engine its row of logits gets the noise of
one token, in float32, and vLLM, which was told temperature 0, takes the largest sum. A nonce that is replayed is a
prompt followed by the tokens of another node, whose positions give the margins of all of them. Both leave one row in
float32: the states that are sketched, one after the other, and then the margins of a replay.

The V1 runner has the logits of a step in ``execute_model_state`` when ``sample_tokens`` begins. The V2 runner makes
them there, by ``compute_logits`` of its model, which is wrapped.

Legend of shapes: M nonces, S sketches of each, N tokens of each, D hidden size, V vocabulary, R rows of logits.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt32
from torch import Tensor

from assay import streams
from assay.errors import UsageError
from assay.poc.engines.base import drawn_seeds, margins
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE, sketch_steps
from assay.poc.protocol.transforms import sketch_states
from assay.poc.vllm.compatibility import runner_kind
from assay.poc.vllm.rows import Chunk, Decode, RowStream

CLAIMED = "assay_claimed"
"""Key of ``extra_args`` of a request that replays: the tokens [N] that another node states."""

MOST_LOGITS = 2**24
"""Numbers of logits that are made at once for margins, and of projections for sketches: vLLM leaves little memory."""


class StepRow(NamedTuple):
    """A nonce in a step: its stream, its row of logits, and its tokens."""

    stream: RowStream
    nonce: int
    row: int
    chunk: Chunk


def decoding_blocker(runner: Any, config: Any) -> str | None:
    """Return what stands in the way of decoding on an engine, in words; None if nothing does.

    With drafts a request has several rows of logits, and a sampler that is spread over the workers has no whole rows.
    """
    if getattr(config, "speculative_config", None) is not None:
        return "decoding beside speculative decoding"
    if getattr(runner, "batch_sharder", None) is not None:
        return "decoding with a sampler that is spread over the workers"
    return None


class Decoding:
    """The nonces that decode on one model runner.

    Raises:
        UsageError: The engine cannot decode nonces; names what stands in the way.
    """

    def __init__(self, runner: Any, config: Any) -> None:
        if reason := decoding_blocker(runner, config):
            raise UsageError(reason, wanted="one row of logits for every request", do="prove it with --engine hf")
        self._runner = runner
        self._width, self._vocab = int(config.model_config.get_hidden_size()), int(config.model_config.get_vocab_size())
        self._streams = streams.get_backend("auto", runner.device.type)
        self._due: tuple[list[int], list[int]] | None = None
        if runner_kind(runner) == "v2":
            compute_logits = runner.model.compute_logits

            def compute_noisy_logits(*args: Any, **kwargs: Any) -> Any:
                due, self._due = self._due, None
                logits_RV = compute_logits(*args, **kwargs)
                return logits_RV if due is None or logits_RV is None else self._noisy(logits_RV, *due)

            runner.model.compute_logits = compute_noisy_logits

    def begin(self, stream: RowStream, nonce: int, request: Any) -> None:
        """Take the new request of a nonce.

        Raises:
            ValueError: It has another length than its round gives it, or embeddings.
        """
        round, steps = stream.spec.round, stream.spec.pipeline.steps
        listed = (request.sampling_params.extra_args or {}).get(CLAIMED)
        positions = round.seq_len + (0 if listed is None else steps - 1)
        given = 0 if request.prompt_embeds is not None else len(request.prompt_token_ids)
        if given != positions or (listed is not None and len(listed) != steps):
            raise ValueError(f"{given} token ids for {positions} positions")
        claimed = None if listed is None else torch.tensor(listed, dtype=torch.int64)
        size = len(sketch_steps(steps)) * self._width + (0 if listed is None else steps)
        kept = torch.full((size,), torch.nan, device=self._runner.device)
        stream.decodes[nonce] = Decode(drawn_seeds(round, "tokens", [nonce], range(steps))[0], claimed, kept)
        stream.fill(nonce)

    def step(self, states_ND: Tensor, found: Sequence[StepRow]) -> Iterator[tuple[StepRow, Exception]]:
        """Keep what a step says of nonces, and have the noise of their next tokens added; yield those that failed."""
        self._due = None
        due: list[tuple[StepRow, int]] = []
        for one in found:
            decode = one.stream.decodes.get(one.nonce)
            if decode is None:
                continue
            try:
                self._keep(states_ND, one, decode)
            except Exception as error:
                yield one, error
                continue
            # The last position of a step gives the next token: none before the prompt has ended.
            token = one.chunk.computed + one.chunk.length - one.stream.spec.round.seq_len
            if decode.claimed is None and 0 <= token < len(decode.noise):
                due.append((one, int(decode.noise[token])))
        if due:
            try:
                self._announce([one.row for one, _ in due], [seed for _, seed in due])
            except Exception as error:
                yield from ((one, error) for one, _ in due)

    def values(self, stream: RowStream, nonces: Sequence[int], rows: Sequence[Tensor]) -> Float32[Tensor, "M W"]:
        """Return sketches [M, S · 12] of nonces that have run, and then the margins [M, N] of a replay."""
        steps = sketch_steps(stream.spec.pipeline.steps)
        kept_MW, size = torch.stack(list(rows)), len(steps) * self._width
        seeds = drawn_seeds(stream.spec.round, "sketch", nonces, steps).reshape(-1)
        states = kept_MW[:, :size].reshape(-1, self._width)
        at_once = max(1, MOST_LOGITS // (SKETCH_SIZE * self._width))
        spans = [slice(start, start + at_once) for start in range(0, len(seeds), at_once)]
        made = torch.cat([sketch_states(states[span], seeds[span]) for span in spans])
        return torch.cat([made.view(len(rows), -1).float(), kept_MW[:, size:]], dim=1)

    def _keep(self, states_ND: Tensor, found: StepRow, decode: Decode) -> None:
        """Keep the states behind sketched tokens, and the margins of claimed ones."""
        stream, nonce, _, chunk = found
        steps = len(decode.noise)
        # The tokens that the positions of this step give, as far as they are tokens of the nonce.
        first = chunk.computed + 1 - stream.spec.round.seq_len
        low, high = max(first, 0), min(first + chunk.length, steps)
        sketched = sketch_steps(steps)
        for token in range(-(-low // SKETCH_EVERY) * SKETCH_EVERY, high, SKETCH_EVERY):
            place = token // SKETCH_EVERY * self._width
            decode.kept[place : place + self._width] = states_ND[chunk.start + token - first]
        at_once, behind = max(1, MOST_LOGITS // self._vocab), len(sketched) * self._width
        for start in range(low, high, at_once) if decode.claimed is not None else ():
            end = min(start + at_once, high)
            logits_NV = self._runner.model.compute_logits(
                states_ND[chunk.start + start - first : chunk.start + end - first]
            )
            if logits_NV is None:  # another worker of the group has them, and answers for all
                break
            scores_NV = logits_NV.float()
            self._streams.add_gumbels(scores_NV, self._seeds(decode.noise[start:end]))
            claimed_N = decode.claimed[start:end].to(scores_NV.device)
            decode.kept[behind + start : behind + end] = margins(scores_NV, claimed_N)
        if high > (sketched[-1] if decode.claimed is None else steps - 1):  # nothing more is to be kept
            stream.put(nonce, decode.kept)

    def _announce(self, rows: list[int], seeds: list[int]) -> None:
        """Add noise to rows of the logits of this step, now or as soon as they are there."""
        state = self._runner.execute_model_state
        if runner_kind(self._runner) == "v2":
            self._due = rows, seeds
        elif state.logits is not None:
            self._runner.execute_model_state = state._replace(logits=self._noisy(state.logits, rows, seeds))

    def _noisy(self, logits_RV: Tensor, rows: list[int], seeds: list[int]) -> Float32[Tensor, "R V"]:
        """Return logits in float32, in which vLLM samples anyway, with noise in some rows."""
        scores_RV = logits_RV.float().contiguous()
        places = torch.tensor(rows, device=scores_RV.device)
        self._streams.add_gumbels(scores_RV, self._seeds(np.array(seeds, np.uint32)), places)
        return scores_RV

    def _seeds(self, seeds: UInt32[np.ndarray, " R"]) -> Tensor:
        return torch.from_numpy(seeds.view(np.int32)).to(self._runner.device)
