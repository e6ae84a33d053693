"""Nonces that decode in vLLM's workers: noise for the logits of a step, and what is kept of them.

Legend of shapes: M nonces, S sketches of each, N tokens of each or of a step, D hidden size, V
vocabulary, R rows of logits, W numbers that are kept of a nonce.
"""

from collections.abc import Sequence
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
from assay.poc.vllm.rows import RowStream, StepRow

# Numbers that are made at once for margins and for sketches: vLLM leaves little memory.
MOST_LOGITS = 2**24


def decoding_blocker(runner: Any, config: Any) -> str | None:
    """Return what stands in the way of decoding on an engine, in words; None if nothing does.

    With drafts a request has several rows of logits, and a sampler that is spread over the workers
    has no whole rows.
    """
    if getattr(config, "speculative_config", None) is not None:
        return "decoding beside speculative decoding"
    if getattr(runner, "batch_sharder", None) is not None:
        return "decoding with a sampler that is spread over the workers"
    return None


class Decode(NamedTuple):
    """A nonce that decodes, or whose tokens are replayed, while its request runs."""

    noise: UInt32[np.ndarray, " N"]
    claimed: Tensor | None  # tokens that are replayed, int64 [N]; None where they are decoded
    kept: Float32[Tensor, " W"]  # states and margins that are known so far; NaN where they are not


class Decoding:
    """The nonces that decode on one model runner.

    A nonce that decodes is a request with a drawn prompt. With every step of the engine its row of
    logits gets the noise of one token, in float32, and vLLM, which was told temperature 0, takes
    the largest sum. A nonce that is replayed is a prompt followed by the tokens of another node,
    whose positions give the margins of all of them. Both leave one row in float32: the states that
    are sketched, one after the other, and then the margins of a replay.

    The V1 runner has the logits of a step in ``execute_model_state`` when ``sample_tokens`` begins.
    The V2 runner makes them there, by ``compute_logits`` of its model, which is wrapped.

    Raises:
        UsageError: The engine cannot decode nonces; names what stands in the way.
    """

    def __init__(self, runner: Any, config: Any, owner: Any) -> None:
        if reason := decoding_blocker(runner, config):
            raise UsageError(
                reason, wanted="one row of logits for every request", do="prove it with --engine hf"
            )
        self._runner = runner
        self._width = int(config.model_config.get_hidden_size())
        self._vocab = int(config.model_config.get_vocab_size())
        self._streams = streams.get_backend("auto", runner.device.type)
        self._owner = owner
        # Nonces of a step, and the seeds of the noise of their next tokens.
        self._due: list[tuple[StepRow, int]] = []
        self._compute_logits = runner.model.compute_logits
        if runner_kind(runner) == "v2":
            runner.model.compute_logits = lambda *args, **options: self._noisy(
                self._compute_logits(*args, **options)
            )

    def begin(
        self, stream: RowStream, nonce: int, request: Any, listed: Sequence[int] | None
    ) -> None:
        """Start a nonce's request; a ValueError for another length or embeddings."""
        round = stream.spec.round
        steps = stream.spec.pipeline.steps
        positions = round.seq_len + (0 if listed is None else steps - 1)
        length = 0 if request.prompt_embeds is not None else len(request.prompt_token_ids)
        if length != positions or (listed is not None and len(listed) != steps):
            raise ValueError(f"{length} token ids for {positions} positions")
        claimed = None if listed is None else torch.tensor(listed, dtype=torch.int64)
        size = len(sketch_steps(steps)) * self._width + (0 if listed is None else steps)
        buffer = torch.full((size,), torch.nan, device=self._runner.device)
        stream.decodes[nonce] = Decode(
            drawn_seeds(round.inputs([nonce]), "tokens", range(steps))[0], claimed, buffer
        )

    def read(self, states_ND: Tensor, step_row: StepRow) -> None:
        """Keep what a step says of a nonce, and note the noise of its next token."""
        stream, nonce, _, chunk = step_row
        decode = stream.decodes[nonce]
        self._keep(states_ND, step_row, decode)
        # The last position of a step gives the next token: none before the prompt has ended.
        token = chunk.computed + chunk.length - stream.spec.round.seq_len
        if decode.claimed is None and 0 <= token < len(decode.noise):
            self._due.append((step_row, int(decode.noise[token])))

    def end_step(self) -> None:
        """Add noise to the logits of a step; the V2 runner has them later."""
        due = self._due
        if not due or runner_kind(self._runner) == "v2":
            return
        try:
            state = self._runner.execute_model_state
            self._runner.execute_model_state = state._replace(logits=self._noisy(state.logits))
        except Exception as error:
            for step_row, _ in due:
                self._owner.fail(step_row.stream, step_row.nonce, error)

    def values(
        self, stream: RowStream, nonces: Sequence[int], rows: Sequence[Tensor]
    ) -> Float32[Tensor, "M W"]:
        """Return sketches [M, S · 12] of finished nonces, then margins [M, N] of a replay."""
        steps = sketch_steps(stream.spec.pipeline.steps)
        kept_MW = torch.stack(list(rows))
        size = len(steps) * self._width
        seeds = drawn_seeds(stream.spec.round.inputs(nonces), "sketch", steps).reshape(-1)
        states = kept_MW[:, :size].reshape(-1, self._width)
        at_once = max(1, MOST_LOGITS // (SKETCH_SIZE * self._width))
        parts = [slice(start, start + at_once) for start in range(0, len(seeds), at_once)]
        sketches = torch.cat([sketch_states(states[part], seeds[part]) for part in parts])
        return torch.cat([sketches.view(len(rows), -1).float(), kept_MW[:, size:]], dim=1)

    def _keep(self, states_ND: Tensor, step_row: StepRow, decode: Decode) -> None:
        """Keep the states behind sketched tokens, and the margins of claimed ones."""
        stream, nonce, _, chunk = step_row
        steps = len(decode.noise)
        # The tokens that the positions of this step give, as far as they are tokens of the nonce.
        first = chunk.computed + 1 - stream.spec.round.seq_len
        low = max(first, 0)
        high = min(first + chunk.length, steps)
        sketched = sketch_steps(steps)
        for token in range(-(-low // SKETCH_EVERY) * SKETCH_EVERY, high, SKETCH_EVERY):
            place = token // SKETCH_EVERY * self._width
            decode.kept[place : place + self._width] = states_ND[chunk.start + token - first]
        at_once = max(1, MOST_LOGITS // self._vocab)
        behind = len(sketched) * self._width
        for start in range(low, high, at_once):
            if decode.claimed is None:
                break
            end = min(start + at_once, high)
            logits_NV = self._compute_logits(
                states_ND[chunk.start + start - first : chunk.start + end - first]
            )
            # Another worker of the group has them, and answers for all.
            if logits_NV is None:
                break
            scores_NV = logits_NV.float()
            self._streams.add_gumbels(scores_NV, self._seeds(decode.noise[start:end]))
            claimed_N = decode.claimed[start:end].to(scores_NV.device)
            decode.kept[behind + start : behind + end] = margins(scores_NV, claimed_N)
        # Nothing more is to be kept.
        if high > (sketched[-1] if decode.claimed is None else steps - 1):
            stream.put(nonce, decode.kept)

    def _noisy(self, logits_RV: Any) -> Any:
        """Return logits in float32, in which vLLM samples anyway, with the noise that is due in
        some rows; those of a step of chat, and None, as they are.
        """
        due = self._due
        self._due = []
        if logits_RV is None or not due:
            return logits_RV
        scores_RV = logits_RV.float().contiguous()
        places = torch.tensor([step_row.row for step_row, _ in due], device=scores_RV.device)
        seeds = self._seeds(np.array([seed for _, seed in due], np.uint32))
        self._streams.add_gumbels(scores_RV, seeds, places)
        return scores_RV

    def _seeds(self, seeds: UInt32[np.ndarray, " R"]) -> Tensor:
        return torch.from_numpy(seeds.view(np.int32)).to(self._runner.device)
