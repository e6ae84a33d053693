"""Forward passes of one fixed shape: a lean decoder as one CUDA graph, or Inductor's kernels.

Inductor may not choose kernels by timing them: two processes with one fingerprint must return the
same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.models.decoder import backbone, decoder_layers
from assay.models.model import Model
from assay.models.precision import own_precision
from assay.poc.engines.hf.lean_decoder import LeanDecoder, fusible, layer_shape
from assay.poc.protocol.transforms import ROWS_OF_A_PRODUCT

FUSED = "fused"
"""Entry of a fingerprint's kernels: assay's own stand between the products, not Inductor's."""

# In the order of preference; each serves what those before it do not.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Of Inductor: kernels follow from what they compute, never from a timing, whatever the process has
# set. They go with each function that is compiled: Dynamo puts torch's deterministic mode back
# after every trace, and with it Inductor's setting of that name, so a patch around many functions
# would hold for the first.
INDUCTOR_OPTIONS = {
    "deterministic": True,  # reductions have one configuration, and matrices are not padded
    "triton.autotune_pointwise": False,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "coordinate_descent_check_all_directions": False,
    "force_fuse_int_mm_with_mul": False,
}

# Every shape, dtype and model that a process proves is a variant of the same few functions.
_VARIANTS = 512


def worth_compiling(model: Model) -> bool:
    """Return whether ``prove`` compiles a model by default: on CUDA, where triton is installed."""
    return model.device.type == "cuda" and find_spec("triton") is not None


class CompiledForward:
    """Runs the decoder of a model on inputs of one fixed shape, B nonces of T positions.

    A model of a listed family runs between assay's own kernels where they serve it
    (:class:`LeanDecoder`), and any other one is compiled as a whole, as transformers has it. The
    last layer serves the last position alone where B rows are enough for products in which the
    place of a row does not matter: from :data:`ROWS_OF_A_PRODUCT` on.
    """

    def __init__(self, model: Model, batch_size: int, seq_len: int) -> None:
        self._model = model
        self.fused = fusible(model, seq_len)
        if self.fused:
            decoder = LeanDecoder(model, seq_len)
            hidden = decoder.hidden
            last_hidden = decoder.last_hidden
        else:
            body = torch.compile(
                backbone(model.module), dynamic=False, options=dict(INDUCTOR_OPTIONS)
            )
            positions_1T = torch.arange(seq_len, device=model.device)[None]

            def hidden(inputs_BTD: Tensor, first: int = 0) -> Tensor:
                states_BTD: Tensor = body(
                    inputs_embeds=inputs_BTD,
                    use_cache=False,
                    position_ids=positions_1T.expand(len(inputs_BTD), -1),
                ).last_hidden_state
                return states_BTD

        if not (self.fused and batch_size >= ROWS_OF_A_PRODUCT):

            def last_hidden(inputs_BTD: Tensor) -> Tensor:
                return hidden(inputs_BTD)[:, -1].float()

        self._last_hidden = RecordedGraph(last_hidden) if self.fused else last_hidden
        self._hidden = cache(
            lambda first: RecordedGraph(partial(hidden, first=first)) if self.fused else hidden
        )

    @cached_property
    def attention(self) -> str:
        """Name of the attention kernel. Late: asking sets torch's choice for the whole process."""
        if not self.fused:
            return "sdpa"
        shape = layer_shape(decoder_layers(self._model.module)[0])
        model = self._model
        q, k = (
            torch.empty(1, count, 64, shape.head_width, dtype=model.dtype, device=model.device)
            for count in (shape.heads, shape.key_heads)
        )
        with sdpa_kernel(_ATTENTION, set_priority=True):
            chosen = torch._fused_sdp_choice(
                q, k, k, is_causal=True, enable_gqa=shape.heads != shape.key_heads
            )
        return f"sdpa {SDPBackend(chosen).name.removesuffix('_ATTENTION').lower()}"

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last position's state after the final norm, [B, D] in float32."""
        with _settings(inputs_BTD):
            return self._last_hidden(inputs_BTD)

    def hidden(self, inputs_BTD: Tensor, first: int = 0) -> Tensor:
        """Return the states after the final norm from ``first`` on, or of all positions if few."""
        batch_size, seq_len, _ = inputs_BTD.shape
        rows = batch_size * (seq_len - first)
        forward = self._hidden(first if rows >= ROWS_OF_A_PRODUCT else 0)
        with _settings(inputs_BTD):
            return forward(inputs_BTD)


class RecordedGraph:
    """A function of one tensor of fixed shape, recorded as a CUDA graph when it is first called.

    It keeps nothing alive but its input and output, so what the function reads besides must stay
    where it is. It is recorded on a stream of its own, of the device of its input. Torch's own
    choice is one stream for the whole process: on that the products of a graph write to memory that
    another graph may give back; and it is of one device, so of a function on another one nothing
    would be recorded.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function gives for a tensor."""
        if self._graph is None:
            self._input = x.clone()
            self._graph = torch.cuda.CUDAGraph()
            # This compiles, and nothing may be compiled while a graph is recorded.
            self._function(self._input)
            # Other threads, such as those of a service, may use the device meanwhile.
            stream: Any = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = self._function(self._input)
        self._input.copy_(x)
        self._graph.replay()
        return self._output.clone()


@contextmanager
def _settings(inputs_BTD: Tensor) -> Iterator[None]:
    """Fix what chooses kernels, beside Inductor's settings, while they are compiled and run."""
    from torch._dynamo import config as dynamo

    with (
        dynamo.patch(recompile_limit=_VARIANTS, accumulated_recompile_limit=8 * _VARIANTS),
        sdpa_kernel(_ATTENTION, set_priority=True),
        own_precision(inputs_BTD),
    ):
        yield
