"""The forward pass in kernels made for one shape: assay's own, replayed as one CUDA graph, or Inductor's.

Inductor may not choose kernels by timing them: two processes with one fingerprint must return the same bits.

Legend of shapes: B nonces, T positions, D hidden size.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.models.decoder import backbone, decoder_layers
from assay.models.load import Model
from assay.models.wide import wide_products
from assay.poc.engines.hf.fused import LeanDecoder, fusible, layer_shape
from assay.poc.protocol.transforms import ROWS_OF_A_PRODUCT

CACHE = "TORCHINDUCTOR_CACHE_DIR"

# In the order of preference; each serves what those before it do not.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Of Inductor: kernels follow from what they compute, never from a timing, whatever the process has set, as torchao does
# when it rounds weights. They go with each function that is compiled: Dynamo puts torch's deterministic mode back after
# every trace, and with it Inductor's setting of that name, so a patch around many functions would hold for the first.
_KERNELS = {
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


def keep_kernels() -> None:
    """Let compiled kernels be kept in the user's cache folder, unless the environment names another one.

    Torch's own choice is a temporary folder; it stays where the user's cannot be written.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE) not in (None, default_cache_dir()):  # torch writes its choice there when it is imported
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home directory, or one of another user
        return
    os.environ[CACHE] = str(folder)


def worth_compiling(model: Model) -> bool:
    """Return whether ``prove`` compiles a model by default: on one CUDA device, where triton is installed."""
    return model.device.type == "cuda" and model.devices == 1 and find_spec("triton") is not None


class CompiledForward:
    """Runs the decoder of a model on inputs of one fixed shape.

    A model of a listed family runs between assay's own kernels where they serve it (:class:`LeanDecoder`), and any
    other one is compiled as a whole, as transformers has it. The last layer serves the last position alone where B rows
    are enough for products in which the place of a row does not matter: from :data:`ROWS_OF_A_PRODUCT` on.

    Args:
        model: Model whose decoder is compiled.
        batch_size: Number of nonces of a batch, B.
        seq_len: Number of positions, T.
    """

    def __init__(self, model: Model, batch_size: int, seq_len: int) -> None:
        keep_kernels()
        self._model, self.fused = model, fusible(model, seq_len)
        if self.fused:
            decoder = LeanDecoder(model, seq_len)
            hidden, last_hidden = decoder.hidden, decoder.last_hidden
        else:
            body = torch.compile(backbone(model.module), dynamic=False, options=dict(_KERNELS))
            positions_1T = torch.arange(seq_len, device=model.device)[None]

            def hidden(inputs_BTD: Tensor) -> Tensor:
                positions = {"position_ids": positions_1T.expand(len(inputs_BTD), -1)}
                states_BTD: Tensor = body(inputs_embeds=inputs_BTD, use_cache=False, **positions).last_hidden_state
                return states_BTD

        if not (self.fused and batch_size >= ROWS_OF_A_PRODUCT):

            def last_hidden(inputs_BTD: Tensor) -> Tensor:
                return hidden(inputs_BTD)[:, -1].float()

        self._last_hidden = _Graph(last_hidden) if self.fused else last_hidden
        self._hidden = _Graph(hidden) if self.fused else hidden

    @cached_property
    def attention(self) -> str:
        """Which kernel attends. Asked for late: the question sets torch's choice for all threads of the process."""
        if not self.fused:
            return "sdpa"
        shape, model = layer_shape(decoder_layers(self._model.module)[0]), self._model
        q, k = (
            torch.empty(1, count, 64, shape.head_width, dtype=model.dtype, device=model.device)
            for count in (shape.heads, shape.key_heads)
        )
        with sdpa_kernel(_ATTENTION, set_priority=True):
            chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=shape.heads != shape.key_heads)
        return f"sdpa {SDPBackend(chosen).name.removesuffix('_ATTENTION').lower()}"

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last position's state after the final norm, [B, D] in float32."""
        with _settings(inputs_BTD):
            return self._last_hidden(inputs_BTD)

    def hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the states of all positions after the final norm, [B, T, D] in the model's dtype."""
        with _settings(inputs_BTD):
            return self._hidden(inputs_BTD)


class _Graph:
    """A function of one tensor of fixed shape, recorded as a CUDA graph at its first call: a replay is one launch.

    It keeps nothing alive but its input and output, so what the function reads besides must stay where it is. It is
    recorded on a stream of its own, of the device of its input. Torch's own choice is one stream for the whole process:
    on that the products of a graph write to memory that another graph may give back; and it is of one device, so of a
    function on another one nothing would be recorded.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Tensor) -> Tensor:
        """Return what the function gives for a tensor."""
        if self._graph is None:
            self._input, self._graph = given.clone(), torch.cuda.CUDAGraph()
            self._function(self._input)  # compiles; nothing may be compiled while a graph is recorded
            # Other threads, such as those of a service, may use the device meanwhile.
            with torch.cuda.graph(self._graph, stream=_stream(given.device), capture_error_mode="thread_local"):
                self._output = self._function(self._input)
        self._input.copy_(given)
        self._graph.replay()
        return self._output.clone()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return another stream of a device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _settings(inputs_BTD: Tensor) -> Iterator[None]:
    """Hold what decides about kernels, beside Inductor's settings, while they are compiled and while they run."""
    from torch._dynamo import config as dynamo

    with (
        dynamo.patch(recompile_limit=_VARIANTS, accumulated_recompile_limit=8 * _VARIANTS),
        sdpa_kernel(_ATTENTION, set_priority=True),
        wide_products(inputs_BTD),
    ):
        yield
