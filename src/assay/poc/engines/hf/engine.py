"""The engine on transformers: the definition, and the default on CPU and CUDA.

:func:`plain_outputs` does one thing after the other. :func:`overlapped_outputs` keeps a CUDA device
busy: while batch n runs, the inputs of batch n + 1 are made and the states of batch n − 1 are
transformed, each on a stream of its own. The host waits for one event per batch, behind which the
next batch is queued already.

Whether a batch fits is asked before it runs: a CPU that runs out of memory kills the process
instead of raising.

Legend of shapes: B nonces of a batch, T positions, P positions of the prompt, N tokens, V
vocabulary, D hidden size, S sketches.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Float16, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache
from typing_extensions import override

from assay import streams
from assay.errors import (
    AssayError,
    ModelError,
    OutOfMemory,
    UsageError,
    is_out_of_memory,
    not_finite,
)
from assay.models.catalogue import ModelInfo
from assay.models.decoder import backbone, decoder_layers
from assay.models.device import free_bytes, processor, to_device
from assay.models.model import Model
from assay.models.precision import WIDE, is_wide, own_precision
from assay.models.shared_passes import steps_of_passes
from assay.poc.engines.base import (
    Decoded,
    Engine,
    HostCopy,
    Replayed,
    drawn_prompts,
    drawn_seeds,
    margins,
    noise_inputs,
    padded_batches,
    token_inputs,
)
from assay.poc.engines.hf.compiled_forward import FUSED, CompiledForward, worth_compiling
from assay.poc.protocol.blocks import BlockFactor, block_factor
from assay.poc.protocol.pipelines import (
    LayerStep,
    Pipeline,
    check_frame,
    get_pipeline,
    sketch_steps,
)
from assay.poc.protocol.proof import Fingerprint
from assay.poc.protocol.round import MAX_BATCH, Round, check_batch_size
from assay.poc.protocol.transforms import (
    ROWS_OF_A_PRODUCT,
    Reading,
    Transform,
    project,
    reflect,
    sketch_states,
    unit,
)
from assay.streams.arrays import as_tensor, dtype_name

# Live at once at the widest point of a layer: residual, normed input, two MLP branches and their
# product, q, k, v and the attention output. Measured peaks stay under this.
_HIDDEN_COPIES = 8
_WIDE_COPIES = 3

_TOKENS_AT_ONCE = 256  # of one nonce whose logits are held, each V numbers

# Positions of a batch from which on more of them are not faster, measured (docs/gpu.md); a CPU is
# filled by fewer.
_ENOUGH_POSITIONS = {"cuda": 32_768, "cpu": 8_192}


def check_shape(model: Model | ModelInfo, *, batch_size: int, seq_len: int, steps: int = 0) -> None:
    """Refuse a shape that no engine runs, for a model or what :func:`assay.models.model_info` says
    of it.

    Raises:
        UsageError: The batch is out of range, or prompt and decoded steps have no position or more
            than the model.
    """
    check_batch_size(batch_size)
    if not 1 <= seq_len <= model.max_positions - steps:
        fitting = f"pass --seq-len {max(1, min(256, model.max_positions - steps))}"
        seen = f"seq_len {seq_len}{f' and {steps} tokens' if steps else ''} with {model.reference}"
        do = f"{fitting}, or another --preset such as decode-64" if steps else fitting
        raise UsageError(
            seen,
            wanted=f"1 to its {model.max_positions} positions{' together' if steps else ''}",
            do=do,
        )


def peak_bytes(model: Model, batch_size: int, seq_len: int) -> int:
    """Estimate the peak of the activations of one batch, in bytes."""
    config = model.config
    chosen = int(
        getattr(config, "num_experts_per_tok", 0) or 0
    )  # a row for each expert of a position
    wide = max(
        int(getattr(config, "intermediate_size", 0) or 0),
        4 * model.hidden_size,
        chosen * model.hidden_size,
    )
    per_position = _HIDDEN_COPIES * model.hidden_size + _WIDE_COPIES * wide
    return batch_size * seq_len * per_position * max(model.dtype.itemsize, 2)


def fitting_batch(model: Model, seq_len: int) -> int:
    """Return the largest batch that fits into what is free now, by the estimate; 0 where not even
    one row does.
    """
    return _room(model) // max(1, peak_bytes(model, 1, seq_len))


def _room(model: Model) -> int:
    """Return the bytes that the activations of a batch may take."""
    if not is_wide(model.device, model.dtype):
        return _free(model.device)
    # Each weight in its turn is there in float32 as well.
    largest = max(part.numel() for part in model.module.parameters())
    return max(0, _free(model.device) - torch.float32.itemsize * largest)


def _free(device: torch.device) -> int:
    """Return the bytes that a batch may take: what is free, less what recorded CUDA graphs keep for
    their replay.

    Torch has reserved that for them and nothing is in it between two replays, so it looks free and
    is not.
    """
    if device.type != "cuda":
        return free_bytes(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    kept = (
        s
        for s in segments
        if s["device"] == index and tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    return free_bytes(device) - sum(
        int(segment["total_size"]) - int(segment["allocated_size"]) for segment in kept
    )


def auto_batch(model: Model, seq_len: int) -> int:
    """Return the batch size for a device: the largest useful power of two that fits into half of
    the free memory.

    A sequence that is too long for that gets a batch of one, and :func:`check_fits` has the last
    word.
    """
    most = min(_ENOUGH_POSITIONS[model.device.type] // seq_len, fitting_batch(model, seq_len) // 2)
    return 1 << max(0, most.bit_length() - 1)


def check_fits(model: Model, batch_size: int, seq_len: int) -> None:
    """Refuse a batch that would not fit, and name the largest one that would."""
    free = _room(model)
    need = peak_bytes(model, batch_size, seq_len)
    if need <= free:
        return
    fits = fitting_batch(model, seq_len)
    gib = 2**30
    seen = (
        f"a batch of {batch_size} × {seq_len} positions takes about {need / gib:.1f} GiB of "
        f"{free / gib:.1f} free"
    )
    do = f"pass --batch-size {fits}" if fits else f"pass a shorter --seq-len than {seq_len}"
    raise OutOfMemory(seen, wanted="a batch that fits into memory", do=do)


def _transform_output(
    step: LayerStep, drawn_D: Tensor, layer: nn.Module, args: Any, output: Any
) -> Any:
    """Apply the step to the hidden state that a decoder layer returns, in a tuple or not."""
    if isinstance(output, tuple):
        return (_transform_output(step, drawn_D, layer, args, output[0]), *output[1:])
    if step == "signs":
        return output * drawn_D
    return reflect(unit(output) if step == "normalize_reflect" else output, drawn_D)


class Draws:
    """What is drawn for the nonces of a batch: :func:`drawn_prompts`, and what follows from
    :func:`drawn_seeds`.
    """

    def __init__(
        self, engine: "HFEngine", round: Round, pipeline: Pipeline, nonces: Sequence[int]
    ) -> None:
        self._backend = streams.get_backend("auto", str(engine.device))
        self.steps, self.sketched = pipeline.steps, sketch_steps(pipeline.steps)
        prompts_BP = drawn_prompts(
            round, nonces, seq_len=engine.seq_len, vocab_size=engine.vocab_size
        )
        self.prompts_BP: Int64[Tensor, "B P"] = torch.from_numpy(prompts_BP).to(engine.device)
        noise_BN = drawn_seeds(round, "tokens", nonces, range(self.steps))
        self._noise_BN = torch.from_numpy(noise_BN.view(np.int32)).to(engine.device)
        self._sketch_BS = drawn_seeds(round, "sketch", nonces, self.sketched)

    def add_noise(self, logits_BV: Float32[Tensor, "B V"], step: int) -> None:
        """Add the Gumbel numbers of one step to the logits of every nonce, in place."""
        self._backend.add_gumbels(logits_BV, self._noise_BN[:, step])

    def add_noise_of(self, row: int, logits_NV: Float32[Tensor, "N V"], start: int) -> None:
        """Add the Gumbel numbers of the steps from ``start`` on to the logits of one nonce, in
        place.
        """
        self._backend.add_gumbels(logits_NV, self._noise_BN[row, start : start + len(logits_NV)])

    def sketches(self, states_BSD: Float[Tensor, "B S D"]) -> Float16[np.ndarray, "B S K"]:
        """Return the sketches of the states that gave the sketched tokens."""
        made = sketch_states(states_BSD.flatten(0, 1), self._sketch_BS.reshape(-1))
        return made.view(*states_BSD.shape[:2], -1).cpu().numpy()


COMPILED = "compiled"
COMPILED_WHOLE = "compiled whole"
"""Entries of the fingerprint's kernels: made for the shape, or compiled of the model as
transformers defines it.
"""

# Matrix products of fewer rows take kernels in which the place of a row decides its last bits.
MIN_POSITIONS = 16


class HFEngine(Engine):
    """Runs a :class:`assay.models.Model` on noise, in batches of one fixed shape.

    Args:
        model: Model that :func:`assay.load_model` returned.
        batch_size: B, rows of every batch. It is raised where B · T would be under 16 positions, so
            that the bits of a row never depend on its place.
        seq_len: T, positions of every row.
        compiled: Whether to run compiled kernels instead of those of eager torch. The first batch
            takes seconds longer.

    Raises:
        UsageError: The sequence is longer than the model's positions, or the batch is out of range.
        OutOfMemory: A batch of this shape does not fit; the message names one that would.
    """

    def __init__(
        self, model: Model, *, batch_size: int = 32, seq_len: int = 256, compiled: bool = False
    ) -> None:
        check_shape(model, batch_size=batch_size, seq_len=seq_len)
        if batch_size > 1:
            batch_size = max(batch_size, -(-MIN_POSITIONS // seq_len))
        check_fits(model, batch_size, seq_len)
        self.model = model
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.hidden_size = model.hidden_size
        self.vocab_size = model.vocab_size
        self.dtype = dtype_name(model.dtype)
        self.device = model.device
        self.frame = model.frame
        self._backbone = backbone(model.module)
        self._streams = streams.get_backend("auto", str(model.device))
        self._positions_BT = torch.arange(seq_len, device=model.device).expand(batch_size, seq_len)
        self._compiled = CompiledForward(model, batch_size, seq_len) if compiled else None
        self._hooked = False

    @override
    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            engine="hf",
            device=processor(self.device),
            dtype=self.model.quantised or self.dtype,
            attention=self._compiled.attention
            if self._compiled
            else self.model.module.config._attn_implementation,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            threads=0 if self.device.type == "cuda" else torch.get_num_threads(),
            torch=torch.__version__,
            library=f"transformers {transformers.__version__}",
            kernels=tuple(self._kernels()),
        )

    def _kernels(self) -> Iterator[str]:
        """Yield what was chosen beside the defaults."""
        if self._compiled is not None:
            yield COMPILED if self._compiled.fused else COMPILED_WHOLE
            if self.device.type == "cuda":
                yield f"triton {version('triton')}"
            if self._compiled.fused:
                yield FUSED
        if is_wide(self.device, self.model.dtype):
            yield WIDE
        if torch.are_deterministic_algorithms_enabled():
            yield "deterministic"

    def inputs(self, round: Round, nonces: Sequence[int]) -> Float[Tensor, "B T D"]:
        """Return the input embeddings of B nonces, in the engine's dtype."""
        pipeline = get_pipeline(round.preset)
        if pipeline.framed:
            check_frame(
                pipeline, self.frame, hidden_size=self.hidden_size, vocab_size=self.vocab_size
            )
            assert self.frame is not None
            return self.embed(token_inputs(round, self.frame, nonces, seq_len=self.seq_len))
        shape = {"seq_len": self.seq_len, "hidden_size": self.hidden_size}
        return noise_inputs(self._streams, round, nonces, dtype=self.dtype, **shape)

    @torch.inference_mode()
    def embed(self, ids_BT: Int64[np.ndarray, "B T"]) -> Float[Tensor, "B T D"]:
        """Return the embeddings of tokens, as the model makes them."""
        made: Tensor = self.model.module.get_input_embeddings()(to_device(ids_BT, self.device))
        return made

    @torch.inference_mode()
    def read(
        self, inputs_BTD: Float[Tensor, "B T D"], reading: Reading | None = None
    ) -> Float32[Tensor, "B D"]:
        """Return what a pipeline reads of the hidden states after the final norm.

        Args:
            inputs_BTD: Input embeddings of the engine's fixed shape.
            reading: How the positions are read; None takes the state of the last one as it is.

        Raises:
            AssayError: As :meth:`outputs`, or a UsageError because the inputs are of another shape.
        """
        return self._finite(self._run(inputs_BTD, reading))

    @override
    def supports(self, pipeline: Pipeline) -> bool:
        return True

    @override
    def outputs(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int]
    ) -> Generator[NDArray[Any]]:
        try:
            if self.device.type == "cuda":
                yield from overlapped_outputs(self, round, pipeline, nonces)
            else:
                yield from plain_outputs(self, round, pipeline, nonces)
        except (
            torch.OutOfMemoryError,
            MemoryError,
            OutOfMemory,
        ) as error:  # of any step, the inputs among them
            raise self._too_large() from error

    def draws(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Draws:
        """Return the prompts, the noise of the tokens and the projections of the sketches of
        nonces.
        """
        return Draws(self, round, pipeline, nonces)

    @override
    def decoded(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int]
    ) -> Generator[Decoded]:
        for count, draws in self._drawn(round, pipeline, nonces):
            with self._explained():
                with own_precision(self.model):
                    tokens_BN, states_BSD = self._decode(draws)
                made = Decoded(
                    tokens_BN[:count].cpu().numpy().astype(np.uint32),
                    draws.sketches(states_BSD)[:count],
                )
            self._check_finite(made.sketches)
            yield made

    @override
    def replayed(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int], tokens_MN: NDArray[np.uint32]
    ) -> Generator[Replayed]:
        done = 0
        for count, draws in self._drawn(round, pipeline, nonces):
            with self._explained():
                given_BN = torch.from_numpy(tokens_MN[done : done + count].astype(np.int64)).to(
                    self.device
                )
                with own_precision(self.model):
                    states_BND, margins_BN = self._replay(draws, given_BN)
                sketches_BSK = draws.sketches(states_BND[:, draws.sketched])[:count]
                made = Replayed(margins_BN.cpu().numpy(), sketches_BSK)
            self._check_finite(*made)
            done += count
            yield made

    def _drawn(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int]
    ) -> Iterator[tuple[int, Draws]]:
        """Yield the number of nonces of every batch, and what is drawn for it, padded to a fixed
        number of rows.

        A step has one position of each row, and a product needs 16 rows or one.
        """
        check_shape(
            self.model, batch_size=self.batch_size, seq_len=self.seq_len, steps=pipeline.steps
        )
        rows = self.batch_size if self.batch_size == 1 else max(self.batch_size, ROWS_OF_A_PRODUCT)
        check_fits(self.model, rows, self.seq_len + pipeline.steps)
        for count, padded in padded_batches(nonces, self.batch_size, rows):
            with self._explained():
                draws = self.draws(round, pipeline, padded)
            yield count, draws

    @torch.inference_mode()
    def _decode(self, draws: Draws) -> tuple[Int64[Tensor, "B N"], Float32[Tensor, "B S D"]]:
        """Return the decoded tokens, and the states behind the sketched ones."""
        prompts_BP = draws.prompts_BP
        tokens: list[Tensor] = []
        states: list[Tensor] = []
        anew = {
            steps[0]
            for steps in steps_of_passes(self.model.config, prompts_BP.shape[1], draws.steps)
        }
        for step in range(draws.steps):
            if step in anew:
                cache = DynamicCache(config=self.model.module.config)
                seen = 0
                inputs_BT = torch.cat(
                    [prompts_BP, *(token_B.unsqueeze(1) for token_B in tokens)], dim=1
                )
            states_BTD = self._read_tokens(inputs_BT, seen, past_key_values=cache, use_cache=True)
            state_BD = states_BTD[:, -1]
            if step in draws.sketched:
                states.append(state_BD.float())
            scores_BV = self._logits(state_BD)
            draws.add_noise(scores_BV, step)
            tokens.append(scores_BV.argmax(dim=-1))
            seen += inputs_BT.shape[1]
            inputs_BT = tokens[-1].unsqueeze(1)
        return torch.stack(tokens, dim=1), torch.stack(states, dim=1)

    @torch.inference_mode()
    def _replay(
        self, draws: Draws, given_BN: Int64[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "R N D"], Float32[Tensor, "B N"]]:
        """Return the states that gave the tokens, by a forward pass over prompts and tokens, and
        their margins.

        The products of margins are of one nonce's states, so no other nonce has a part in their
        bits.
        """
        prompts_RP = draws.prompts_BP
        tokens_RN = torch.cat([given_BN, given_BN[-1:].expand(len(prompts_RP) - len(given_BN), -1)])
        ids_RT = torch.cat([prompts_RP, tokens_RN[:, :-1].clamp(max=self.vocab_size - 1)], dim=1)
        first = prompts_RP.shape[1]
        passes = steps_of_passes(self.model.config, first, tokens_RN.shape[1])
        read = partial(self._read_tokens, seen=0, use_cache=False)
        parts = [
            read(ids_RT[:, : first + steps.stop - 1])[:, first - 1 + steps.start :]
            for steps in passes
        ]
        states_RND = torch.cat(parts, dim=1)
        found = []
        for row, tokens_N in enumerate(given_BN):
            parts = []
            for start in range(0, len(tokens_N), _TOKENS_AT_ONCE):
                chosen = slice(start, start + _TOKENS_AT_ONCE)
                scores_NV = self._logits(states_RND[row, chosen])
                draws.add_noise_of(row, scores_NV, start)
                parts.append(margins(scores_NV, tokens_N[chosen]))
            found.append(torch.cat(parts))
        return states_RND, torch.stack(found)

    def _read_tokens(
        self, ids_BT: Int64[Tensor, "B T"], seen: int, **options: Any
    ) -> Float[Tensor, "B T D"]:
        """Return the states of tokens that follow so many others."""
        positions_T = torch.arange(seen, seen + ids_BT.shape[1], device=self.device)
        output = self._backbone(
            input_ids=ids_BT, position_ids=positions_T.expand_as(ids_BT), **options
        )
        states_BTD: Tensor = output.last_hidden_state
        return states_BTD

    def _logits(self, states_ND: Float[Tensor, "N D"]) -> Float32[Tensor, "N V"]:
        """Return the product of states with the model's own head matrix; no bias, no capping of
        logits.

        It is one product, because row by row would take longer than all layers of a step. So the
        last bits of a token's logits may depend on the rows of the batch on processors whose
        products do, and the noise of honest engines has that in it.
        """
        weight_VD: Tensor = self.model.module.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        return (states_ND.to(weight_VD.dtype) @ weight_VD.T).float()

    def _check_finite(self, *computed: np.ndarray) -> None:
        if any(
            np.isnan(values).any() for values in computed
        ):  # an infinite margin is that of an id without a token
            raise not_finite(f"{self.model.reference} returned NaN or infinity")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise what goes wrong as an error that explains it: every architecture fails in its own
        way.
        """
        try:
            yield
        except AssayError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise self._too_large() from error
            another = "use another architecture, such as Llama, Qwen3 or Mistral"
            seen = (
                f"{self.model.reference} ({self.model.architecture}) does not run: "
                f"{type(error).__name__}: {error}"
            )
            do = f"try --kernels eager, or {another}" if self._compiled else another
            raise ModelError(
                seen, wanted="a decoder that takes input embeddings and positions", do=do
            ) from error

    @torch.inference_mode()
    def _run(self, inputs_BTD: Tensor, reading: Reading | None) -> Tensor:
        """Run the model; the states may be NaN or infinity, because to look at them is to wait for
        the device.
        """
        self._check_inputs(inputs_BTD)
        with self._explained():
            if self._compiled is not None and not self._hooked:
                run = self._compiled
                if reading is None:
                    return run.last_hidden(inputs_BTD)
                return reading.sum(run.hidden(inputs_BTD, reading.first))
            hidden_BTD = self._hidden(inputs_BTD)
        return hidden_BTD[:, -1].float() if reading is None else reading.sum(hidden_BTD)

    @torch.inference_mode()
    def states(self, inputs_BTD: Float[Tensor, "B T D"]) -> Float32[Tensor, "B T D"]:
        """Return the states of all positions after the final norm, by the kernels of eager torch.

        Raises:
            AssayError: As :meth:`read`.
        """
        self._check_inputs(inputs_BTD)
        with self._explained():
            states_BTD = self._hidden(inputs_BTD).float()
        return self._finite(states_BTD)

    def _finite(self, states: Tensor) -> Tensor:
        if not bool(torch.isfinite(states).all()):
            raise not_finite(f"{self.model.reference} returned NaN or infinity in {self.dtype}")
        return states

    def _hidden(self, inputs_BTD: Tensor) -> Tensor:
        with own_precision(self.model):
            output = self._backbone(
                inputs_embeds=inputs_BTD, position_ids=self._positions_BT, use_cache=False
            )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _check_inputs(self, inputs_BTD: Tensor) -> None:
        wanted = (self.batch_size, self.seq_len, self.hidden_size)
        if tuple(inputs_BTD.shape) != wanted:
            seen = f"inputs of shape {tuple(inputs_BTD.shape)}"
            do = "pad the batch with throw-away nonces"
            raise UsageError(seen, wanted=f"the engine's fixed shape {wanted}", do=do)

    def _too_large(self) -> OutOfMemory:
        """Name a batch that would fit: by the estimate, and at most half of the one that did
        not.
        """
        fits = min(self.batch_size // 2, fitting_batch(self.model, self.seq_len) or MAX_BATCH)
        return OutOfMemory(
            f"the device ran out of memory on a batch of {self.batch_size} × {self.seq_len} "
            f"positions",
            wanted="room for the activations of one batch",
            do=f"pass --batch-size {fits}"
            if fits
            else f"pass a shorter --seq-len than {self.seq_len}",
        )

    @torch.inference_mode()
    def trained_head(self, x_BD: Float[Tensor, "B D"]) -> Float32[Tensor, "B V"]:
        """Return x Wᵀ for the model's own head matrix, without bias or capping of logits."""
        weight_VD: Tensor = self.model.module.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        return project(x_BD.to(weight_VD.dtype), weight_VD).float()

    @contextmanager
    def between_layers(self, step: LayerStep, round: Round) -> Iterator[None]:
        """Apply a transform after every decoder layer while open; LayersNotFound where they are not
        known.
        """
        stream = "layer_signs" if step == "signs" else "layer_reflection"
        layers = [] if step == "none" else list(decoder_layers(self.model.module))
        with ExitStack() as hooks:
            for index, layer in enumerate(layers):
                seeds = streams.seeds([round.block_text(stream, index)])
                if step == "signs":
                    drawn_D = as_tensor(self._streams.signs(seeds, self.hidden_size))[0]
                else:
                    normals_D = as_tensor(self._streams.normals(seeds, self.hidden_size))[0]
                    drawn_D = normals_D / torch.linalg.vector_norm(normals_D)
                hook = partial(_transform_output, step, drawn_D.to(self.model.dtype))
                hooks.enter_context(layer.register_forward_hook(hook))
            self._hooked = step != "none"
            try:
                yield
            finally:
                self._hooked = False


def plain_outputs(
    engine: HFEngine, round: Round, pipeline: Pipeline, nonces: Sequence[int]
) -> Generator[NDArray[Any]]:
    """Yield the outputs of a pipeline a batch at a time; the last batch is padded, then cut."""
    transform = make_transform(engine, round, pipeline)
    with engine.between_layers(pipeline.layers, round):
        for count, padded in padded_batches(nonces, engine.batch_size, engine.batch_size):
            states_BD = engine.read(
                engine.inputs(round, padded), transform.reading(padded, engine.seq_len)
            )
            yield transform(states_BD, padded).cpu().numpy()[:count]


def overlapped_outputs(
    engine: HFEngine, round: Round, pipeline: Pipeline, nonces: Sequence[int]
) -> Generator[NDArray[Any]]:
    """Yield what :func:`plain_outputs` yields, on a CUDA device that never waits, as nothing looks
    at the states.
    """
    inputs, forward, tail = cuda = _cuda_streams(engine.device)
    with torch.cuda.stream(tail):
        transform = make_transform(engine, round, pipeline)

    def queue(padded: list[int]) -> tuple[Tensor, torch.cuda.Event]:
        """Queue the inputs and the forward pass of a batch; return its states, and the event when
        they are there.
        """
        with torch.cuda.stream(inputs):
            inputs_BTD = engine.inputs(round, padded)
            reading = transform.reading(padded, engine.seq_len)
        forward.wait_stream(inputs)
        with torch.cuda.stream(forward):
            for made in (inputs_BTD, *(reading or ())):
                if isinstance(made, Tensor):
                    made.record_stream(
                        forward
                    )  # do not reuse its memory before this stream is done
            return engine._run(inputs_BTD, reading), forward.record_event()

    def finish(
        count: int, padded: list[int], states_BD: Tensor, ready: torch.cuda.Event
    ) -> NDArray[Any]:
        """Transform the states of a batch and bring the outputs of its first nonces to the host."""
        with torch.cuda.stream(tail), torch.inference_mode():
            tail.wait_event(ready)
            states_BD.record_stream(tail)
            values = HostCopy(transform(states_BD, padded))
        return values.numpy()[:count]

    before: tuple[int, list[int], Tensor, torch.cuda.Event] | None = None
    # No stream stays current across a yield: the caller may use the device for something else.
    with engine.between_layers(pipeline.layers, round):
        # The model was loaded on this stream, and the steps between its layers were prepared on it.
        for stream in cuda:
            stream.wait_stream(torch.cuda.current_stream(engine.device))
        for count, padded in padded_batches(nonces, engine.batch_size, engine.batch_size):
            batch = count, padded, *queue(padded)
            if before is not None:
                yield finish(*before)
            before = batch
        if before is not None:
            yield finish(*before)


@cache
def _cuda_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Return the one set of streams of a device, for inputs, forward passes and what follows them.

    Torch reuses freed memory only on the stream that freed it.
    """
    return tuple(torch.cuda.Stream(device) for _ in range(3))  # type: ignore[no-untyped-call]


def make_transform(engine: "HFEngine", round: Round, pipeline: Pipeline) -> Transform:
    """Return the randomisation of a round for an engine's states."""
    return Transform(
        round,
        pipeline,
        hidden_size=engine.hidden_size,
        vocab_size=engine.vocab_size,
        device=engine.device,
        trained_head=engine.trained_head,
        frame=engine.frame,
    )


def is_compiled(fingerprint: Fingerprint) -> bool:
    """Return whether a fingerprint is one of this engine with compiled kernels."""
    return fingerprint.engine == "hf" and not {COMPILED, COMPILED_WHOLE}.isdisjoint(
        fingerprint.kernels
    )


def be_deterministic() -> None:
    """Switch the mode on for this process; call it before the device is used.

    No sums in less than float32 inside a product, and a workspace of its own for every stream of
    cuBLAS, without which streams that run side by side may choose other kernels.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory that it has not written
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


STATES = 128  # nonces whose states are read by default; the factor is then known to a few per cent
BATCH = 32


def measure_block_factor(model: Model, round: Round, *, nonces: int = STATES) -> BlockFactor:
    """Measure how much wider the distances of a round's block are than the chord law.

    A few hidden states say where their energy lies. With the folded head of the block that gives
    the width of all its distances, for every node, before any is proved.

    Args:
        model: Model whose states are read.
        round: Round of a preset with signs and a random head.
        nonces: Number of nonces whose states are read, rounded up to whole batches of 32.

    Raises:
        UsageError: The preset has no such factor.
        ModelError: The model cannot be run.
        OutOfMemory: The device has no room for a batch.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_gamma", public_key="node_A", seq_len=16)
        >>> found = assay.poc.measure_block_factor(model, round, nonces=32)
        >>> found.n, 1.0 < found.value < 1.2, 20 < found.effective_dimension < 60
        (32, True, True)
    """
    engine = HFEngine(
        model, batch_size=BATCH, seq_len=round.seq_len, compiled=worth_compiling(model)
    )
    return read_block_factor(engine, round, nonces=nonces)


def read_block_factor(engine: HFEngine, round: Round, *, nonces: int = STATES) -> BlockFactor:
    """Measure the factor of a round's block with an engine whose states can be read, as
    `measure_block_factor` does.
    """
    size = engine.batch_size
    batches = [range(start, start + size) for start in range(0, max(nonces, 2), size)]
    states_BD = [engine.read(engine.inputs(round, batch), None).clone() for batch in batches]
    return block_factor(round, torch.cat(states_BD).cpu().double().numpy())
