"""The engine on transformers: the definition, and the default on CPU and CUDA."""

import os
import platform
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
import transformers
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor, nn

from assay import streams
from assay.errors import BadWeights, ModelError, OutOfMemory, UsageError, is_out_of_memory
from assay.models import Model, backbone, decoder_layers
from assay.poc.engines._inputs import noise_inputs
from assay.poc.engines._outputs import overlapped_outputs, plain_outputs
from assay.poc.engines.hf._compiled import CompiledForward
from assay.poc.engines.hf._memory import check_fits, fitting_batch
from assay.poc.protocol import Fingerprint, LayerStep, Pipeline, Round, project, reflect, unit, weighted_sum

MAX_BATCH = 65_536

COMPILED, COMPILED_WHOLE = "compiled", "compiled whole"
"""Entries of the fingerprint's kernels: the lean decoder was compiled, or the model as transformers defines it."""

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
        if type(batch_size) is not int or not 1 <= batch_size <= MAX_BATCH:
            raise UsageError(f"batch size {batch_size!r}", wanted=f"1 to {MAX_BATCH}", do="try --batch-size 32")
        if seq_len > model.max_positions:
            raise UsageError(
                f"seq_len {seq_len} with {model.reference}",
                wanted=f"at most its {model.max_positions} positions",
                do=f"pass --seq-len {min(256, model.max_positions)}",
            )
        if batch_size > 1:
            batch_size = max(batch_size, -(-MIN_POSITIONS // seq_len))
        check_fits(model, batch_size, seq_len)
        self.model = model
        self.batch_size, self.seq_len = batch_size, seq_len
        self.hidden_size, self.vocab_size = model.hidden_size, model.vocab_size
        self.dtype, self.device = streams.dtype_name(model.dtype), model.device
        self._backbone = backbone(model.module)
        self._streams = streams.get_backend("auto", str(model.device))
        self._positions_BT = torch.arange(seq_len, device=model.device).expand(batch_size, seq_len)
        self._compiled = CompiledForward(model, batch_size, seq_len) if compiled and model.devices == 1 else None
        self._hooked = False

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""
        on_cuda = self.device.type == "cuda"
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return Fingerprint(
            engine="hf",
            device=torch.cuda.get_device_name(self.device) if on_cuda else processor,
            dtype=self.model.quantised or self.dtype,
            attention=self._compiled.attention if self._compiled else self.model.module.config._attn_implementation,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            threads=0 if on_cuda else torch.get_num_threads(),
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
        if self.model.quantised:
            yield f"torchao {version('torchao')}"
        if self.model.devices > 1:
            yield f"tp {self.model.devices}"
        if torch.are_deterministic_algorithms_enabled():
            yield "deterministic"

    def inputs(self, round: Round, nonces: Sequence[int]) -> Float[Tensor, "B T D"]:
        """Return the input embeddings [B, T, D] of B nonces, N(0, 1), in the engine's dtype."""
        shape = {"seq_len": self.seq_len, "hidden_size": self.hidden_size}
        return noise_inputs(self._streams, round, nonces, dtype=self.dtype, **shape)

    @torch.inference_mode()
    def last_hidden(self, inputs_BTD: Float[Tensor, "B T D"]) -> Float32[Tensor, "B D"]:
        """Return the last token's hidden state after the final norm, [B, D] in float32.

        Raises:
            UsageError: The inputs are not of the engine's fixed shape.
            BadWeights: The model returned NaN or infinity.
            OutOfMemory: The device ran out of memory.
            ModelError: This architecture cannot be run on input embeddings.
        """
        return self._finite(self._read(inputs_BTD, None))

    @torch.inference_mode()
    def weighted_hidden(
        self, inputs_BTD: Float[Tensor, "B T D"], weights_BT: Float32[Tensor, "B T"]
    ) -> Float32[Tensor, "B D"]:
        """Return the weighted sum of the unit hidden states after the final norm, [B, D] in float32.

        Raises:
            AssayError: One of those that :meth:`last_hidden` raises.
        """
        return self._finite(self._read(inputs_BTD, weights_BT))

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
        on_cuda = self.device.type == "cuda"
        made = overlapped_outputs(self, self._read, round, pipeline, nonces) if on_cuda else None
        try:
            yield from made or plain_outputs(self, round, pipeline, nonces)
        except (torch.OutOfMemoryError, MemoryError, OutOfMemory) as error:  # of any step, the inputs among them
            raise self._too_large() from error

    @torch.inference_mode()
    def _read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Run the model: the last hidden state, or the weighted sum of all, [B, D] in float32."""
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
            output = self._backbone(inputs_embeds=inputs_BTD, position_ids=self._positions_BT, use_cache=False)
        except Exception as error:  # every architecture fails in its own way
            raise self._failed(error) from error
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD[:, -1].float() if weights_BT is None else weighted_sum(hidden_BTD, weights_BT)

    def _finite(self, x_BD: Tensor) -> Tensor:
        if not bool(torch.isfinite(x_BD).all()):
            raise BadWeights(
                f"{self.model.reference} returned NaN or infinity in {self.dtype}",
                wanted="finite hidden states",
                do="check the checkpoint, or use a dtype with more range (--dtype float32)",
            )
        return x_BD

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
        if step == "none":
            yield
            return
        handles = [
            layer.register_forward_hook(_LayerHook(self._layer_function(step, round, index)))
            for index, layer in enumerate(decoder_layers(self.model.module))
        ]
        self._hooked = True
        try:
            yield
        finally:
            self._hooked = False
            for handle in handles:
                handle.remove()

    def _layer_function(self, step: LayerStep, round: Round, index: int) -> Any:
        stream = "layer_signs" if step == "signs" else "layer_reflection"
        seeds = streams.seeds([round.block_text(stream, index)])
        if step == "signs":
            signs_D = streams.as_tensor(self._streams.signs(seeds, self.hidden_size))[0].to(self.model.dtype)
            return lambda x_BTD: x_BTD * signs_D
        v_D = streams.as_tensor(self._streams.normals(seeds, self.hidden_size))[0]
        v_D = (v_D / torch.linalg.vector_norm(v_D)).to(self.model.dtype)
        if step == "reflect":
            return lambda x_BTD: reflect(x_BTD, v_D)
        return lambda x_BTD: reflect(unit(x_BTD), v_D)


class _LayerHook:
    """Applies a function to the hidden state that a decoder layer returns, tuple or not."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._function(output[0]), *output[1:])
        return self._function(output)


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
