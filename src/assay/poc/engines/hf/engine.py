"""The engine on transformers: the definition, and the default on CPU and CUDA."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor, nn

from assay import streams
from assay.errors import AssayError, ModelError, OutOfMemory, UsageError, is_out_of_memory, not_finite
from assay.models.decoder import backbone, decoder_layers
from assay.models.device import processor
from assay.models.load import Model
from assay.models.wide import WIDE, is_wide, wide_products
from assay.poc.engines.base import MAX_BATCH, noise_inputs
from assay.poc.engines.decoding import Decoded, Draws, Replayed
from assay.poc.engines.hf.compiled import CompiledForward
from assay.poc.engines.hf.decoding import decoded, replayed
from assay.poc.engines.hf.fused import FUSED
from assay.poc.engines.hf.memory import check_fits, check_shape, fitting_batch
from assay.poc.engines.outputs import overlapped_outputs, plain_outputs
from assay.poc.protocol.pipelines import LayerStep, Pipeline
from assay.poc.protocol.record import Fingerprint
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import project, reflect, unit, weighted_sum
from assay.streams.backends import as_tensor, dtype_name

# --------------------------------------------------------------------------------------------------
# Transforms between the decoder layers, for the pipelines that change the model's own computation.

LayerFunction = Callable[[Tensor], Tensor]


@contextmanager
def transformed_layers(model: Model, backend: streams.Backend, step: LayerStep, round: Round) -> Iterator[None]:
    """Apply a transform to what every decoder layer returns while the context is open; nothing for the step "none"."""
    layers = [] if step == "none" else list(decoder_layers(model.module))
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            function = _layer_function(model, backend, step, round, index)
            hooks.enter_context(layer.register_forward_hook(partial(_apply, function)))
        yield


def _layer_function(model: Model, backend: streams.Backend, step: LayerStep, round: Round, index: int) -> LayerFunction:
    stream = "layer_signs" if step == "signs" else "layer_reflection"
    seeds = streams.seeds([round.block_text(stream, index)])
    if step == "signs":
        signs_D = as_tensor(backend.signs(seeds, model.hidden_size))[0].to(model.dtype)
        return lambda x_BTD: x_BTD * signs_D
    v_D = as_tensor(backend.normals(seeds, model.hidden_size))[0]
    v_D = (v_D / torch.linalg.vector_norm(v_D)).to(model.dtype)
    if step == "reflect":
        return lambda x_BTD: reflect(x_BTD, v_D)
    return lambda x_BTD: reflect(unit(x_BTD), v_D)


def _apply(function: LayerFunction, layer: nn.Module, args: Any, output: Any) -> Any:
    """Apply a function to the hidden state that a decoder layer returns, in a tuple or not."""
    if isinstance(output, tuple):
        return (function(output[0]), *output[1:])
    return function(output)


COMPILED, COMPILED_WHOLE = "compiled", "compiled whole"
"""Entries of the fingerprint's kernels: the lean decoder was compiled, or the model as transformers defines it."""

T = TypeVar("T")

# Matrix products of fewer rows take kernels in which the place of a row decides its last bits.
MIN_POSITIONS = 16


class HFEngine:
    """Runs a :class:`assay.models.Model` on noise, in batches of one fixed shape.

    Args:
        model: Model that :func:`assay.load_model` returned.
        batch_size: B, rows of every batch. It is raised where B · T would be under 16 positions, so that the bits of a
            row never depend on its place.
        seq_len: T, positions of every row.
        compiled: Whether to run compiled kernels instead of those of eager torch. The first batch takes seconds
            longer. A model that is spread over several devices is never compiled.

    Raises:
        UsageError: The sequence is longer than the model's positions, or the batch is out of range.
        OutOfMemory: A batch of this shape does not fit; the message names one that would.
    """

    def __init__(self, model: Model, *, batch_size: int = 32, seq_len: int = 256, compiled: bool = False) -> None:
        check_shape(model, batch_size=batch_size, seq_len=seq_len)
        if batch_size > 1:
            batch_size = max(batch_size, -(-MIN_POSITIONS // seq_len))
        check_fits(model, batch_size, seq_len)
        self.model = model
        self.batch_size, self.seq_len = batch_size, seq_len
        self.hidden_size, self.vocab_size = model.hidden_size, model.vocab_size
        self.dtype, self.device = dtype_name(model.dtype), model.device
        self._backbone = backbone(model.module)
        self._streams = streams.get_backend("auto", str(model.device))
        self._positions_BT = torch.arange(seq_len, device=model.device).expand(batch_size, seq_len)
        self._compiled = CompiledForward(model, batch_size, seq_len) if compiled and model.devices == 1 else None
        self._hooked = False

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""
        return Fingerprint(
            engine="hf",
            device=processor(self.device),
            dtype=self.model.quantised or self.dtype,
            attention=self._compiled.attention if self._compiled else self.model.module.config._attn_implementation,
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
            yield COMPILED if self._compiled.lean else COMPILED_WHOLE
            if self.device.type == "cuda":
                yield f"triton {version('triton')}"
            if self._compiled.fused:
                yield FUSED
        if self.model.quantised == "int8":
            yield f"torchao {version('torchao')}"
        if is_wide(self.device, self.model.dtype):
            yield WIDE
        if self.model.devices > 1:
            yield f"tp {self.model.devices}"
        if torch.are_deterministic_algorithms_enabled():
            yield "deterministic"

    def inputs(self, round: Round, nonces: Sequence[int]) -> Float[Tensor, "B T D"]:
        """Return the input embeddings [B, T, D] of B nonces, N(0, 1), in the engine's dtype."""
        shape = {"seq_len": self.seq_len, "hidden_size": self.hidden_size}
        return noise_inputs(self._streams, round, nonces, dtype=self.dtype, **shape)

    @torch.inference_mode()
    def read(
        self, inputs_BTD: Float[Tensor, "B T D"], weights_BT: Float32[Tensor, "B T"] | None = None
    ) -> Float32[Tensor, "B D"]:
        """Return what a pipeline reads of the hidden states h after the final norm, [B, D] in float32.

        Args:
            inputs_BTD: Input embeddings of the engine's fixed shape.
            weights_BT: Weights of the sum Σ_t w_t · h_t/(‖h_t‖ + 1e-8), ±1, or 0 where a position is not read; None
                reads the state of the last position as it is.

        Raises:
            UsageError: The inputs are not of the engine's fixed shape.
            BadWeights: The model returned NaN or infinity.
            OutOfMemory: The device ran out of memory.
            ModelError: This architecture cannot be run on input embeddings.
        """
        states_BD = self._run(inputs_BTD, weights_BT)
        if not bool(torch.isfinite(states_BD).all()):
            raise not_finite(f"{self.model.reference} returned NaN or infinity in {self.dtype}")
        return states_BD

    def supports(self, pipeline: Pipeline) -> bool:
        """Return True: every step of every pipeline runs on transformers."""
        return True

    def outputs(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[NDArray[Any]]:
        """Yield what the pipeline publishes of the nonces in their order, ``batch_size`` of them at a time.

        On CUDA a state that is not finite gives NaN.

        Raises:
            BadWeights: The model returned NaN or infinity on a CPU.
            OutOfMemory: The device ran out of memory.
            ModelError: This architecture cannot be run on input embeddings.
        """
        try:
            if self.device.type == "cuda":
                yield from overlapped_outputs(self, self._run, round, pipeline, nonces)
            else:
                yield from plain_outputs(self, round, pipeline, nonces)
        except (torch.OutOfMemoryError, MemoryError, OutOfMemory) as error:  # of any step, the inputs among them
            raise self._too_large() from error

    def draws(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Draws:
        """Return the prompts, the noise of the tokens and the projections of the sketches of nonces."""
        shape = {"seq_len": self.seq_len, "vocab_size": self.vocab_size}
        return Draws(round, pipeline, nonces, device=self.device, **shape)

    def decoded(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[Decoded]:
        """Decode the tokens of nonces with a key-value cache, ``batch_size`` of them at a time.

        The kernels are those of eager torch, whether the engine was compiled or not.

        Raises:
            UsageError: Prompt and tokens are longer than the model's positions.
            BadWeights: The model returned NaN or infinity.
            OutOfMemory: The device has no room for the caches of a batch.
            ModelError: This architecture cannot be run with a key-value cache.
        """
        yield from self._named(decoded(self, round, pipeline, nonces))

    def replayed(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int], tokens_MN: NDArray[np.uint32]
    ) -> Generator[Replayed]:
        """Replay given tokens of nonces, [M, N], by one forward pass for each batch.

        Raises:
            AssayError: As :meth:`decoded`.
        """
        yield from self._named(replayed(self, round, pipeline, nonces, tokens_MN))

    def _named(self, batches: Generator[T]) -> Generator[T]:
        """Yield batches, and raise what goes wrong as an error that explains it."""
        try:
            yield from batches
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._too_large() from error
        except AssayError:
            raise
        except Exception as error:  # every architecture fails in its own way
            raise self._failed(error) from error

    @torch.inference_mode()
    def _run(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Run the model; the states may be NaN or infinity, because to look at them is to wait for the device."""
        wanted = (self.batch_size, self.seq_len, self.hidden_size)
        if tuple(inputs_BTD.shape) != wanted:
            raise UsageError(
                f"inputs of shape {tuple(inputs_BTD.shape)}",
                wanted=f"the engine's fixed shape {wanted}",
                do="pad the batch with throw-away nonces",
            )
        try:
            if self._compiled is not None and not self._hooked:
                run = self._compiled
                if weights_BT is None:
                    return run.last_hidden(inputs_BTD)
                return weighted_sum(run.hidden(inputs_BTD), weights_BT)
            with wide_products(self.model):
                output = self._backbone(inputs_embeds=inputs_BTD, position_ids=self._positions_BT, use_cache=False)
        except Exception as error:  # every architecture fails in its own way
            raise self._failed(error) from error
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD[:, -1].float() if weights_BT is None else weighted_sum(hidden_BTD, weights_BT)

    def _too_large(self) -> OutOfMemory:
        """Name a batch that would fit: by the estimate, and at most half of the one that did not."""
        fits = min(self.batch_size // 2, fitting_batch(self.model, self.seq_len) or MAX_BATCH)
        return OutOfMemory(
            f"the device ran out of memory on a batch of {self.batch_size} × {self.seq_len} positions",
            wanted="room for the activations of one batch",
            do=f"pass --batch-size {fits}" if fits else f"pass a shorter --seq-len than {self.seq_len}",
        )

    def _failed(self, error: Exception) -> ModelError | OutOfMemory:
        """Return the error that explains the failure of a forward pass."""
        if is_out_of_memory(error):
            return self._too_large()
        another = "use another architecture, such as Llama, Qwen3 or Mistral"
        return ModelError(
            f"{self.model.reference} ({self.model.architecture}) does not run: {type(error).__name__}: {error}",
            wanted="a decoder that takes input embeddings and positions",
            do=f"try --kernels eager, or {another}" if self._compiled else another,
        )

    @torch.inference_mode()
    def trained_head(self, x_BD: Float[Tensor, "B D"]) -> Float32[Tensor, "B V"]:
        """Return x Wᵀ for the model's own head matrix, [B, V] in float32; no bias, no capping of logits."""
        weight_VD: Tensor = self.model.module.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        return project(x_BD.to(weight_VD.dtype), weight_VD).float()

    @contextmanager
    def between_layers(self, step: LayerStep, round: Round) -> Iterator[None]:
        """Apply a transform after every decoder layer while the context is open.

        Raises:
            LayersNotFound: The decoder layers of this architecture are not known.
        """
        with transformed_layers(self.model, self._streams, step, round):
            self._hooked = step != "none"
            try:
                yield
            finally:
                self._hooked = False


def is_compiled(fingerprint: Fingerprint) -> bool:
    """Return whether a fingerprint is one of this engine with compiled kernels."""
    return fingerprint.engine == "hf" and not {COMPILED, COMPILED_WHOLE}.isdisjoint(fingerprint.kernels)


def be_deterministic() -> None:
    """Switch the mode on for this process; call it before the device is used.

    No TensorFloat-32, no sums in less than float32 inside a product, and a workspace of its own for every stream of
    cuBLAS, without which streams that run side by side may choose other kernels.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory that it has not written
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
