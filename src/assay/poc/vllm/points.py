"""The chain's decode proof in vLLM's workers: inputs and reflections of nonce rows alone.

A nonce is a request whose prompt is noise. With every step of the engine its state becomes a point,
and before the next step the embedding of the token that vLLM sampled is replaced by the input that
this point seeds. A nonce that is replayed is one prompt of noise and of the inputs that the claimed
points seed.

Layers that are compiled take no hooks, so the engine must run eagerly, with the V1 runner. Under
tensor parallelism every worker of a group has the same states, for their sums are the same bits
everywhere, and so each makes the same points by itself. Stages would have to send the points back
to the first one, and a mixture has routers that the round seeds, which only transformers does.

Legend of shapes: N rows of a step, T positions of a nonce, D hidden size, Q points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay import streams
from assay.errors import UsageError
from assay.poc.engines.base import margins, noise_inputs
from assay.poc.protocol.round import Round
from assay.poc.protocol.sphere import Chain
from assay.poc.protocol.transforms import layer_reflection, reflect
from assay.poc.vllm.compatibility import runner_kind
from assay.poc.vllm.rows import Chunk, RowStream, StepRow, call_before, step_spans
from assay.streams.arrays import dtype_name

_MOST_BLOCKS = 4  # whose reflections are kept


def chain_blocker(runner: Any, config: Any) -> str | None:
    """Return why an engine cannot run the chain's decode proof, or None."""
    model = config.model_config
    parallel = config.parallel_config
    checks = (
        (not model.enforce_eager, "chain-decode without --enforce-eager"),
        (not model.enable_prompt_embeds, "chain-decode without --enable-prompt-embeds"),
        (runner_kind(runner) == "v2", "chain-decode on the V2 model runner"),
        (parallel.pipeline_parallel_size > 1, "chain-decode in pipeline stages"),
        (model.is_moe, "chain-decode on a mixture of experts"),
        (config.speculative_config is not None, "chain-decode beside speculative decoding"),
    )
    return next((reason for blocks, reason in checks if blocks), None)


@dataclass(eq=False)
class ChainState:
    """A nonce whose chain runs: the points so far, or those that are claimed."""

    chain: Chain
    claimed: NDArray[np.uint8] | None
    points: list[int] = field(default_factory=list)
    # Of a replay, by position: vLLM may preempt a prompt, and runs it from its start again.
    margins: Tensor = field(default_factory=lambda: torch.empty(0))


class Chains:
    """The chains of one model runner.

    Raises:
        UsageError: The engine cannot run them; names what stands in the way.
    """

    def __init__(self, runner: Any, config: Any, owner: Any) -> None:
        if reason := chain_blocker(runner, config):
            raise UsageError(
                reason,
                wanted="a dense model in eager torch, prompt embeddings, one stage, the V1 runner",
                do="serve with --enforce-eager --enable-prompt-embeds, or prove with --engine hf",
            )
        self._runner = runner
        self._dtype = config.model_config.dtype
        self._width = int(config.model_config.get_hidden_size())
        self._streams = streams.get_backend("auto", runner.device.type)
        self._scheduled: dict[str, int] = {}
        self._reflected: list[tuple[Tensor, list[Tensor]]] = []
        self._reflections = lru_cache(_MOST_BLOCKS)(self._make_reflections)
        self._rows = owner.rows
        count = int(config.model_config.hf_text_config.num_hidden_layers)
        self._layers = _layers_of(runner.model, count)
        for number, layer in enumerate(self._layers):
            layer.register_forward_hook(partial(self._reflect, number))
        call_before(runner, "execute_model", self._schedule, owner)
        call_before(runner, "_model_forward", self._before_forward, owner)

    def _schedule(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> None:
        """Note how many tokens of each request the next step has."""
        self._scheduled = scheduler_output.num_scheduled_tokens

    def begin(
        self, stream: RowStream, nonce: int, request: Any, claimed: Sequence[int] | None
    ) -> None:
        """Start a nonce's request with its inputs; a ValueError for another length."""
        round = stream.spec.round
        inputs = round.inputs([nonce])
        steps = stream.spec.pipeline.steps
        positions = round.seq_len + (0 if claimed is None else steps)
        sent = request.prompt_embeds
        length = len(request.prompt_token_ids if sent is None else sent)
        if length != positions or (claimed is not None and len(claimed) != steps + 1):
            raise ValueError(f"inputs or placeholders of {length} for {positions} positions")
        chain = Chain(
            inputs, hidden_size=self._width, device=self._runner.device, dtype=self._dtype
        )
        parts = [
            noise_inputs(
                self._streams,
                inputs,
                dtype=dtype_name(self._dtype),
                seq_len=round.seq_len,
                hidden_size=self._width,
            )
        ]
        stated = None
        if claimed is not None:
            stated = np.array(claimed, np.uint8)
            parts.append(chain.embeddings(stated[None, :-1], 1))
        request.prompt_embeds = torch.cat(parts, dim=1)[0].cpu()
        request.prompt_is_token_ids = [False] * positions
        stream.decodes[nonce] = ChainState(
            chain, stated, margins=torch.full((steps + 1,), torch.nan, device=self._runner.device)
        )

    def values(self, stream: RowStream, nonces: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Return the points, or the margins of a replay, of finished nonces."""
        return torch.stack(list(rows))

    def read(self, states_ND: Tensor, step_row: StepRow) -> None:
        """Keep the points of the positions of this step, or the margins of claimed ones."""
        stream, nonce, _, chunk = step_row
        state = stream.decodes[nonce]
        steps = stream.spec.pipeline.steps
        first = chunk.computed + 1 - stream.spec.round.seq_len  # step that the first position has
        low = max(first, 0)
        high = min(first + chunk.length, steps + 1)
        if low >= high:
            return
        states = states_ND[chunk.start + low - first : chunk.start + high - first].unsqueeze(0)
        points = state.points if state.claimed is None else state.claimed.tolist()
        before = np.array([[0, *points][low:high]], np.uint8)
        scores_NQ = state.chain.scores(states, before, low)[0]
        if not bool(torch.isfinite(scores_NQ).all()):
            raise ValueError("states that are not finite")
        if state.claimed is None:
            state.points[low:high] = scores_NQ.argmax(dim=1).tolist()
            done = torch.tensor(state.points, dtype=torch.float32)
        else:
            claimed = torch.from_numpy(state.claimed[low:high].astype(np.int64)).to(
                scores_NQ.device
            )
            state.margins[low:high] = margins(scores_NQ, claimed)
            done = state.margins
        if high == steps + 1:
            stream.put(nonce, done)

    def end_step(self) -> None:
        """Do nothing: the points of a step are in what :meth:`read` has kept."""

    # Before the layers: inputs of chains, and where to reflect

    def _before_forward(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Write the inputs of chains over the embeddings of tokens, and note the rows of nonces."""
        self._reflected = []
        rows: dict[Round, list[Tensor]] = {}
        for chunk in step_spans(self._runner, self._scheduled).chunks():
            place = self._rows.find(chunk.request_id)
            state = None if place is None else place[0].decodes.get(place[1])
            if place is None or not isinstance(state, ChainState):
                continue
            round = place[0].spec.round
            rows.setdefault(round, []).append(torch.arange(chunk.start, chunk.start + chunk.length))
            if inputs_embeds is not None and state.claimed is None:
                self._write(inputs_embeds, chunk, round.seq_len, state)
        for round, places in rows.items():
            places_N = torch.cat(places).to(self._runner.device)
            self._reflected.append((places_N, self._reflections(round.block_hash)))

    def _write(self, inputs_ND: Tensor, chunk: Chunk, prompt: int, state: ChainState) -> None:
        """Write the inputs of the positions behind a prompt, in place."""
        first = max(chunk.computed, prompt)
        count = chunk.computed + chunk.length - first
        step = first - prompt + 1
        if count > 0 and len(state.points) >= step + count - 1:
            before = np.array([state.points[step - 1 : step - 1 + count]], np.uint8)
            start = chunk.start + first - chunk.computed
            inputs_ND[start : start + count] = state.chain.embeddings(before, step)[0]

    @torch.inference_mode()
    def _reflect(self, number: int, layer: nn.Module, args: Any, output: Any) -> Any:
        """Reflect the rows of nonces; a residual that is kept apart is reflected by itself."""
        if not self._reflected:
            return None
        parts = output if isinstance(output, tuple) else (output,)
        changed = []
        for part_ND in parts:
            part_ND = part_ND.clone()
            for rows_N, vectors in self._reflected:
                part_ND[rows_N] = reflect(part_ND[rows_N], vectors[number])
            changed.append(part_ND)
        if number == len(self._layers) - 1:
            self._reflected = []  # passes beside the scheduler run the same layers
        return tuple(changed) if isinstance(output, tuple) else changed[0]

    def _make_reflections(self, block_hash: str) -> list[Tensor]:
        """Return the vector of every layer of a block."""
        round = Round(block_hash=block_hash, public_key="any")
        return [
            layer_reflection(self._streams, round, index, self._width).to(
                self._runner.device, self._dtype
            )
            for index in range(len(self._layers))
        ]


def _layers_of(model: nn.Module, count: int) -> list[nn.Module]:
    """Return the decoder layers of one of vLLM's models, in order; a UsageError without them."""
    layers = next(
        (
            part
            for part in model.modules()
            if isinstance(part, nn.ModuleList) and len(part) == count
        ),
        None,
    )
    if layers is None:
        raise UsageError(
            f"chain-decode with {type(model).__name__}, which has no list of {count} layers",
            wanted="a decoder whose layers can be found",
            do="prove it with --engine hf",
        )
    return list(layers)
