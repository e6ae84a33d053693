"""Passes by assay's own decoder over vLLM's weights, in place of vLLM's forward pass (``ASSAY_VLLM_FORWARD=assay``).

vLLM holds queries, keys and values as one matrix and gate and up as another, which is how the lean decoder of the
transformers engine takes them: it runs over the very same memory. Keys and values stay in the pass, so no cache is
needed. Nothing is compiled, and large passes are not recorded: their memory comes from where vLLM's own steps have
theirs, and goes back there. The weights are looked up with every pass, so the first one after a reload runs on the new
ones.

The few nonces that run beside chat are so small a pass that the host takes longer to queue it than a GPU to compute it,
and the next step waits for both. On CUDA such passes are recorded, once for each shape.

Legend of shapes: B nonces of a pass, T positions, D hidden size, H query heads, E head width, F width of the MLP.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.models.decoder import Rotation
from assay.models.families import attention_window, family_of
from assay.poc.engines.hf.compiled import LeanForward, RecordedPasses
from assay.poc.engines.hf.lean import LayerWeights, LeanParts, Shape, rotation_of
from assay.poc.protocol.transforms import ROWS_OF_A_PRODUCT
from assay.poc.vllm.direct_worker import MAX_TABLES, DirectPasses
from assay.poc.vllm.rows import Spec

MODELS = "vllm.model_executor.models."
"""Package of the models that vLLM has written itself."""

_NORMS = ("input_layernorm", "post_attention_layernorm")
_PRODUCTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_NEEDED = {f"{name}.weight" for name in (*_NORMS, *_PRODUCTS)}
_KNOWN = _NEEDED | {f"{name}.bias" for name in _PRODUCTS} | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}

_ANGLES = 0.02  # cosines and sines may differ so far: bfloat16 rounds them by up to 0.004
_TRIED = 16  # positions of the passes with which the kernels are loaded
_RECORDED = 512  # positions of a recorded pass, at most: its states stay in memory
_AHEAD = 2  # passes of so many nonces are recorded before a round begins: what runs beside chat unless settings differ


def why_not_over(model: Any, config: Any) -> str | None:
    """Return what keeps assay's decoder from running over a model of vLLM; None where nothing does.

    Args:
        model: Model of a worker.
        config: vLLM's ``VllmConfig``, of which :func:`check_config` has said what follows from it alone.
    """
    body: Any = getattr(model, "model", None)
    kind, family = type(body), family_of(config.model_config.hf_config)
    if family is None or (kind.__name__, kind.__module__.startswith(MODELS)) != (f"{family.prefix}Model", True):
        return f"{type(model).__name__} of {type(model).__module__}, whose layers are not known"
    dtype = config.model_config.dtype
    return next(filter(None, (_why_not_layer(layer, dtype) for layer in body.layers)), None)


def _why_not_layer(layer: Any, dtype: torch.dtype) -> str | None:
    found: dict[str, nn.Parameter] = dict(layer.named_parameters())
    differing = sorted((found.keys() - _KNOWN) | (_NEEDED - found.keys()))
    if differing:
        return f"layers that differ in {', '.join(differing)[:200]}"
    weights = [found[f"{name}.weight"] for name in _PRODUCTS]
    if any(weight.numel() == 0 for weight in weights):
        return "weights that vLLM has packed for kernels of its own, as it does on a CPU"
    attention, activation = layer.self_attn, type(layer.mlp.act_fn).__name__
    heads, width, rotary = attention.num_heads, attention.head_dim, attention.rotary_emb
    columns, inner = len(found["input_layernorm.weight"]), weights[3].shape[-1]
    rows = (heads + 2 * attention.num_kv_heads) * width
    wanted = [(rows, columns), (columns, heads * width), (2 * inner, columns), (columns, inner)]
    reasons = (
        ([tuple(weight.shape) for weight in weights] != wanted, "weights of other shapes"),
        ({weight.dtype for weight in found.values()} != {dtype}, "weights of another number format"),
        (any(type(weight.data) is not Tensor for weight in found.values()), "weights that are not plain tensors"),
        (attention.attn.attn_type != "decoder", "attention that looks ahead"),
        (getattr(attention, "do_llama_4_scaling", False), "queries that are scaled by their position"),
        ((rotary.rotary_dim, rotary.is_neox_style) != (width, True), "another rotation of queries and keys"),
        (activation != "SiluAndMul", f"{activation} in the MLP"),
    )
    return next((reason for refused, reason in reasons if refused), None)


def weights_of(layer: Any) -> LayerWeights:
    """Return the weights of a layer of vLLM, in their own memory."""
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        input_layernorm=layer.input_layernorm.weight.data,
        qkv=_projection(attention.qkv_proj),
        q_norm=None if q_norm is None else q_norm.weight.data,
        k_norm=None if k_norm is None else k_norm.weight.data,
        o_proj=_projection(attention.o_proj),
        post_attention_layernorm=layer.post_attention_layernorm.weight.data,
        gate_up=_projection(mlp.gate_up_proj),
        down_proj=_projection(mlp.down_proj),
    )


def _projection(linear: Any) -> tuple[Tensor, Tensor | None]:
    bias = getattr(linear, "bias", None)
    return linear.weight.data, None if bias is None else bias.data


class OwnPasses(DirectPasses):
    """Passes of one worker by assay's own decoder; :func:`why_not_over` must have found nothing.

    Args:
        runner: As of :class:`DirectPasses`, as all others.
    """

    def __init__(self, runner: Any, config: Any, *others: Any, **more: Any) -> None:
        super().__init__(runner, config, *others, **more)
        first = self._body.layers[0]
        attention, epsilon = first.self_attn, float(first.input_layernorm.variance_epsilon)
        sizes = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
        self._shape = Shape(*sizes, float(attention.scaling), epsilon, functional.silu)
        self._rotation = lru_cache(MAX_TABLES)(self._make_rotation)
        self._recorded = RecordedPasses(MAX_TABLES)

    @property
    def _body(self) -> Any:
        return self._runner.get_model().model

    def why_not(self, spec: Spec) -> str | None:
        """Return the reason for which a round cannot run; None where it can."""
        seq_len, window = spec.round.seq_len, attention_window(self._config.model_config.hf_config)
        reasons = (
            (spec.pipeline.steps, "nonces that decode"),
            (seq_len > self._config.scheduler_config.max_num_batched_tokens, "nonces longer than a step of the engine"),
            (window is not None and window < seq_len, "a window of attention that is shorter than a nonce"),
        )
        return next((reason for refused, reason in reasons if refused), None)

    @torch.inference_mode()
    def prepare(self, spec: Spec) -> int:
        """Make what depends on the length of a round; return B, the largest number of nonces of a pass."""
        seq_len = spec.round.seq_len
        forward = self.forward(seq_len)
        for count in range(1, _AHEAD + 1):
            if self._is_recorded(count, seq_len):
                self._states(forward, self._some_inputs(count, seq_len))
        return self._batch(seq_len)

    @torch.inference_mode()
    def load(self) -> tuple[str, ...]:
        """Run passes that load every kernel, before there is chat that waits; return the names of the kernels.

        Raises:
            ValueError: They return NaN or infinity.
        """
        forward = self.forward(_TRIED)
        for count in (1, ROWS_OF_A_PRODUCT):
            if not bool(torch.isfinite(forward.last_hidden(self._some_inputs(count, _TRIED))).all()):
                raise ValueError("a pass returned NaN or infinity")
        return forward.kernels

    def forward(self, seq_len: int) -> LeanForward:
        """Return the forward pass over the weights that the worker has now, for inputs of so many positions."""
        layers = [weights_of(layer) for layer in self._body.layers]
        return LeanForward(LeanParts(self._shape, layers, self._body.norm.weight.data, self._rotation(seq_len)))

    def _rows(self, spec: Spec, nonces: list[int]) -> Tensor:
        seq_len = spec.round.seq_len
        inputs_BTD = self._inputs(spec, nonces).view(len(nonces), seq_len, -1)
        forward = self.forward(seq_len)  # on a GPU the inputs are being made meanwhile
        if spec.pipeline.read != "last":
            return self._summed(spec, nonces, self._states(forward, inputs_BTD))
        if self._is_recorded(len(nonces), seq_len):
            return self._states(forward, inputs_BTD)[:, -1].float()
        return forward.last_hidden(inputs_BTD)

    def _states(self, forward: LeanForward, inputs_BTD: Tensor) -> Tensor:
        """Return the states of all positions after the final norm, [B, T, D], by a recorded pass where it is small."""
        recorded = self._is_recorded(*inputs_BTD.shape[:2])
        return self._recorded.hidden(forward, inputs_BTD) if recorded else forward.hidden(inputs_BTD)

    def _is_recorded(self, count: int, seq_len: int) -> bool:
        """Return whether a pass is recorded. From :data:`ROWS_OF_A_PRODUCT` nonces on a pass may leave states out."""
        small = count < ROWS_OF_A_PRODUCT and count * seq_len <= _RECORDED
        return small and self._runner.device.type == "cuda"

    def _some_inputs(self, count: int, seq_len: int) -> Tensor:
        """Return inputs [B, T, D] that say nothing."""
        norm = self._body.norm.weight
        return torch.ones(count, seq_len, self._width, dtype=norm.dtype, device=norm.device)

    def _batch(self, seq_len: int) -> int:
        """Return B, at least 1: a pass fits into the memory that vLLM has measured for its largest step."""
        most = int(self._config.scheduler_config.max_num_batched_tokens) // seq_len
        if self._activations:
            most = min(most, self._activations // (seq_len * self._bytes(seq_len)))
        return max(1, most)

    def _bytes(self, seq_len: int) -> int:
        """Return the bytes of the largest moment of a pass, for each of its positions.

        The inputs, the residual stream, its norm and the states are there together, and beside them gate, up and
        their product; or queries, keys and values, and what is gathered, in two layouts. Where no kernel attends in
        float32, scores are written out twice.
        """
        layer, of_heads = self._body.layers[0], self._shape.heads * self._shape.head_width
        qkv, gate_up = len(layer.self_attn.qkv_proj.weight), len(layer.mlp.gate_up_proj.weight)
        itemsize = int(self._body.norm.weight.dtype.itemsize)
        scores = 2 * self._shape.heads * seq_len if itemsize == 4 else 0
        return itemsize * (4 * self._width + max(gate_up + gate_up // 2, qkv + 2 * of_heads + scores))

    def _make_rotation(self, seq_len: int) -> Rotation:
        """Return the cosines and sines of transformers, which is the definition.

        Raises:
            ValueError: Those of vLLM are others, so it does not take the configuration as transformers does.
        """
        config = self._config.model_config.hf_config.get_text_config()
        family, norm = family_of(config), self._body.norm.weight
        assert family is not None
        module = import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
        rotary = getattr(module, f"{family.prefix}RotaryEmbedding")(config).to(norm.device)
        rotation = rotation_of(rotary, seq_len, norm.dtype, norm.device)
        half = self._shape.head_width // 2
        ours = torch.cat([table_T1E[:, 0, :half] for table_T1E in rotation], dim=-1).float()
        theirs = self._body.layers[0].self_attn.rotary_emb.cos_sin_cache[:seq_len].to(norm.device, torch.float32)
        if theirs.shape != ours.shape or not bool((theirs - ours).abs().max() <= _ANGLES):
            raise ValueError("rotary angles that are not those of transformers")
        return rotation
