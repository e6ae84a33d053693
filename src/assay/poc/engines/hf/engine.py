"""The engine on transformers: the definition, and the default on CPU and CUDA.

:func:`plain_batches` does one thing after the other. :func:`overlapped_batches` keeps a CUDA device
busy: while batch n runs, the embeddings of batch n + 1 are made and the states of batch n − 1 are
transformed, each on a stream of its own. The host waits for one event per batch, behind which the
next batch is queued already. In compiled batches of 128 that is 1.36 and 1.30 times as fast for the
bundled models, which we trained ourselves (`one_by_one` in research/results/gpu_overhead.json), and
1.03 to 1.00 times for 0.6 to 8 billion parameters (`serial` in gpu_prove_*.json).

Legend of shapes: B nonces of a batch, T positions, P positions of the prompt, N tokens, V
vocabulary, D hidden size, S sketches.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor, nn
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
from assay.models.decoder import backbone, decoder_layers
from assay.models.device import processor, to_device
from assay.models.model import Model
from assay.models.precision import WIDE, is_wide, own_precision
from assay.poc.engines.base import (
    Engine,
    HostCopy,
    Values,
    noise_inputs,
    padded_batches,
    token_inputs,
)
from assay.poc.engines.hf.compiled_forward import FUSED, CompiledForward
from assay.poc.engines.hf.decoding import ChainDraws, Draws, StepDraws
from assay.poc.engines.hf.shapes import check_fits, check_shape, fitting_batch
from assay.poc.protocol.checks import MAX_BATCH
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import LayerStep, Pipeline, check_frame, get_pipeline
from assay.poc.protocol.round import Input, Round
from assay.poc.protocol.sphere import Chain
from assay.poc.protocol.transforms import (
    ROWS_OF_A_PRODUCT,
    Reading,
    Transform,
    layer_reflection,
    project,
    reflect,
    unit,
)
from assay.streams.arrays import as_tensor, dtype_name

# Entries of the fingerprint's kernels: made for the shape, or compiled of the model as transformers
# defines it.
COMPILED = "compiled"
COMPILED_WHOLE = "compiled whole"

# Matrix products of fewer rows take kernels in which the place of a row decides its last bits.
MIN_POSITIONS = 16


def _transform_output(
    step: LayerStep, drawn_D: Tensor, layer: nn.Module, args: Any, output: Any
) -> Any:
    """Apply the step to the hidden state that a decoder layer returns, in a tuple or not."""
    if isinstance(output, tuple):
        return (_transform_output(step, drawn_D, layer, args, output[0]), *output[1:])
    if step == "signs":
        return output * drawn_D
    return reflect(unit(output) if step == "normalize_reflect" else output, drawn_D)


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
        # See `MIN_POSITIONS`: a batch of fewer positions would let places decide bits.
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

    def embeddings(self, inputs: Sequence[Input]) -> Float[Tensor, "B T D"]:
        """Return the input embeddings of B inputs, in the engine's dtype.

        Raises:
            ModelError: Layers read tokens too, and would be computed without them.
            UsageError: The frame of the preset is missing, or is one of another model.
        """
        if self.model.config.model_type == "gemma3n_text":
            raise ModelError(
                f"{self.model.reference} is a Gemma 3n, whose layers read the token of a position "
                f"beside its embedding",
                wanted="a decoder that takes input embeddings and positions",
                do="use another architecture, or a preset of tokens, such as --preset decode-64",
            )
        pipeline = get_pipeline(inputs[0].round.preset)
        if pipeline.framed:
            check_frame(
                pipeline, self.frame, hidden_size=self.hidden_size, vocab_size=self.vocab_size
            )
            assert self.frame is not None
            return self.embed_tokens(token_inputs(inputs, self.frame, seq_len=self.seq_len))
        return noise_inputs(
            self._streams,
            inputs,
            dtype=self.dtype,
            seq_len=self.seq_len,
            hidden_size=self.hidden_size,
        )

    @torch.inference_mode()
    def embed_tokens(self, ids_BT: Int64[np.ndarray, "B T"]) -> Float[Tensor, "B T D"]:
        """Return the embeddings of tokens, as the model makes them."""
        embed = self.model.module.get_input_embeddings()
        embeddings_BTD: Tensor = embed(to_device(ids_BT, self.device))
        return embeddings_BTD

    @torch.inference_mode()
    def read(
        self, inputs_BTD: Float[Tensor, "B T D"], reading: Reading | None = None
    ) -> Float32[Tensor, "B D"]:
        """Return what a pipeline reads of the hidden states after the final norm.

        Args:
            inputs_BTD: Input embeddings of the engine's fixed shape.
            reading: How the positions are read; None takes the state of the last one as it is.

        Raises:
            AssayError: As :meth:`run`, or a UsageError because the inputs are of another shape.
        """
        return self._finite(self._run(inputs_BTD, reading))

    @override
    def supports(self, pipeline: Pipeline) -> bool:
        return True

    @override
    def run(
        self,
        inputs: Sequence[Input],
        pipeline: Pipeline,
        claimed_MN: NDArray[Any] | None = None,
    ) -> Generator[Values]:
        if not len(inputs):
            return
        if pipeline.steps:
            yield from self._run_steps(inputs, pipeline, claimed_MN)
            return
        batches = overlapped_batches if self.device.type == "cuda" else plain_batches
        try:
            yield from batches(self, inputs, pipeline)
        except (torch.OutOfMemoryError, MemoryError, OutOfMemory) as error:
            # Any step may have run out of memory, the one that makes inputs too.
            raise self._too_large() from error

    def draws(self, inputs: Sequence[Input], pipeline: Pipeline) -> StepDraws:
        """Return what inputs are decoded from: their prompts, and what follows them."""
        if pipeline.output == "tokens":
            return Draws(inputs, pipeline, seq_len=self.seq_len, model=self.model)
        chain = Chain(
            inputs, hidden_size=self.hidden_size, device=self.device, dtype=self.model.dtype
        )
        return ChainDraws(chain, self.embeddings(inputs), pipeline.steps, self.model)

    def _run_steps(
        self, inputs: Sequence[Input], pipeline: Pipeline, claimed_MN: NDArray[Any] | None
    ) -> Iterator[Values]:
        """Yield decoded tokens or points, or margins of claimed ones; with tokens come sketches.

        A step has one position of each row, and a product needs 16 rows or one.
        """
        check_shape(
            self.model, batch_size=self.batch_size, seq_len=self.seq_len, steps=pipeline.steps
        )
        rows = self.batch_size if self.batch_size == 1 else max(self.batch_size, ROWS_OF_A_PRODUCT)
        check_fits(self.model, rows, self.seq_len + pipeline.steps)
        start = 0
        for count, padded in padded_batches(inputs, self.batch_size, rows):
            # Hooks between layers are of the block of all inputs.
            with self._explained(), self.between_layers(pipeline.layers, padded[0].round):
                draws = self.draws(padded, pipeline)
                if claimed_MN is None:
                    values = draws.decode()
                else:
                    values = draws.replay(claimed_MN[start : start + count])
            values = {name: array[:count] for name, array in values.items()}
            # An infinite margin is that of an id without a token, so only NaN is refused.
            if any(np.isnan(array).any() for array in values.values()):
                raise not_finite(f"{self.model.reference} returned NaN or infinity")
            start += count
            yield values

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
            other_model = "use another architecture, such as Llama, Qwen3 or Mistral"
            do = f"try --kernels eager, or {other_model}" if self._compiled else other_model
            raise ModelError(
                f"{self.model.reference} ({self.model.architecture}) does not run: "
                f"{type(error).__name__}: {error}",
                wanted="a decoder that takes input embeddings and positions",
                do=do,
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
            raise UsageError(
                f"inputs of shape {tuple(inputs_BTD.shape)}",
                wanted=f"the engine's fixed shape {wanted}",
                do="pad the batch with throw-away nonces",
            )

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

    def between_layers(self, step: LayerStep, round: Round) -> "LayerTransforms":
        """Return what applies a transform after every decoder layer while it is open."""
        return LayerTransforms(self, step, round)


class LayerTransforms(AbstractContextManager[None]):
    """The transforms of a block between the layers of an engine's model, drawn once.

    They are on the model while this is open. It is opened for each forward pass: between two
    batches the caller may run other inputs on the model.
    """

    def __init__(self, engine: HFEngine, step: LayerStep, round: Round) -> None:
        self._engine = engine
        self._hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._opened = ExitStack()
        layers = nn.ModuleList() if step == "none" else decoder_layers(engine.model.module)
        for index, layer in enumerate(layers):
            if step == "signs":
                seeds = streams.seeds([round.block_text("layer_signs", index)])
                drawn_D = as_tensor(engine._streams.signs(seeds, engine.hidden_size))[0]
            else:
                drawn_D = layer_reflection(engine._streams, round, index, engine.hidden_size)
            hook = partial(_transform_output, step, drawn_D.to(engine.model.dtype))
            self._hooks.append((layer, hook))

    @override
    def __enter__(self) -> None:
        for layer, hook in self._hooks:
            self._opened.enter_context(layer.register_forward_hook(hook))
        self._engine._hooked = bool(self._hooks)

    @override
    def __exit__(self, *error: object) -> None:
        self._engine._hooked = False
        self._opened.close()


def plain_batches(
    engine: HFEngine, inputs: Sequence[Input], pipeline: Pipeline
) -> Generator[Values]:
    """Yield the values of a pipeline a batch at a time; the last batch is padded, then cut."""
    round = inputs[0].round  # of the block of all inputs
    transform = make_transform(engine, round, pipeline)
    between_layers = engine.between_layers(pipeline.layers, round)
    for count, padded in padded_batches(inputs, engine.batch_size, engine.batch_size):
        reading = transform.reading(padded, engine.seq_len)
        with between_layers:
            states_BD = engine.read(engine.embeddings(padded), reading)
        yield {pipeline.output: transform(states_BD, padded).cpu().numpy()[:count]}


def overlapped_batches(
    engine: HFEngine, inputs: Sequence[Input], pipeline: Pipeline
) -> Generator[Values]:
    """Yield what :func:`plain_batches` yields, on a CUDA device that never waits.

    Nothing looks at the states before they are transformed.
    """
    round = inputs[0].round  # of the block of all inputs
    input_stream, forward, tail = _cuda_streams(engine.device)
    with torch.cuda.stream(tail):
        transform = make_transform(engine, round, pipeline)
    between_layers = engine.between_layers(pipeline.layers, round)

    def queue(padded: list[Input]) -> tuple[Tensor, torch.cuda.Event]:
        """Queue the inputs and the forward pass; return the states, and the event of their end."""
        with torch.cuda.stream(input_stream):
            embeddings_BTD = engine.embeddings(padded)
            reading = transform.reading(padded, engine.seq_len)
        forward.wait_stream(input_stream)
        with torch.cuda.stream(forward), between_layers:
            for value in (embeddings_BTD, *(reading or ())):
                if isinstance(value, Tensor):
                    # Its memory is not reused before this is done.
                    value.record_stream(forward)
            return engine._run(embeddings_BTD, reading), forward.record_event()

    def finish(
        count: int, padded: list[Input], states_BD: Tensor, ready: torch.cuda.Event
    ) -> Values:
        """Transform the states of a batch, and bring the values of its first rows to the host."""
        with torch.cuda.stream(tail), torch.inference_mode():
            tail.wait_event(ready)
            states_BD.record_stream(tail)
            values = HostCopy(transform(states_BD, padded))
        return {pipeline.output: values.numpy()[:count]}

    before: tuple[int, list[Input], Tensor, torch.cuda.Event] | None = None
    # The model was loaded on this stream, and the steps between its layers were prepared on it.
    for stream in (input_stream, forward, tail):
        stream.wait_stream(torch.cuda.current_stream(engine.device))
    # No stream stays current across a yield: the caller may use the device for something else.
    for count, padded in padded_batches(inputs, engine.batch_size, engine.batch_size):
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
