"""Assay's own decoder over weights as vLLM holds them, without vLLM: states, places, refusals, and streams of calls."""

import asyncio
import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from assay.errors import ModelError, UsageError
from assay.models import Model
from assay.models.wide import wide_products
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.engines.hf import compiled as _compiled
from assay.poc.engines.hf import fused as _fused
from assay.poc.engines.hf.lean import LeanDecoder, layer_shape, layer_weights, rotation_of
from assay.poc.protocol.transforms import Transform
from assay.poc.vllm import compatibility as _compatibility
from assay.poc.vllm import compatibility as _versions
from assay.poc.vllm import direct_worker as _direct_worker
from assay.poc.vllm.direct_stream import OwnStream
from assay.poc.vllm.own_passes import OwnPasses, weights_of, why_not_over
from assay.poc.vllm.preflight import PluginSettings
from assay.poc.vllm.rows import Spec
from assay.poc.vllm.throttle import ThrottleSettings
from assay.poc.vllm.worker import WorkerExtension
from tests.poc.engines import plain_kernels
from tests.poc.engines.test_lean import KINDS, LENGTH, inputs, made, plain
from tests.vllm.direct import Workers
from tests.vllm.direct import config as settings
from tests.vllm.test_parts_gate import settings_of_vllm


def module(name: str, package: str = "layers", **parts: Any) -> nn.Module:
    """A module of vLLM by its class's name, with parts that are modules, parameters or plain values."""
    one = type(name, (nn.Module,), {"__module__": f"vllm.model_executor.{package}"})()
    for part, value in parts.items():
        setattr(one, part, nn.Parameter(value, requires_grad=False) if isinstance(value, torch.Tensor) else value)
    return one


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    return module("QKVParallelLinear", weight=weight, bias=bias)


def layer_of(layer: Any, tables: torch.Tensor) -> nn.Module:
    """A layer of transformers as vLLM holds it."""
    shape, weights = layer_shape(layer), layer_weights(layer)
    rotary = SimpleNamespace(rotary_dim=shape.head_width, is_neox_style=True, cos_sin_cache=tables)
    parts = {"qkv_proj": linear(*weights.qkv), "o_proj": linear(*weights.o_proj), "rotary_emb": rotary}
    parts |= {"num_heads": shape.heads, "num_kv_heads": shape.key_heads, "head_dim": shape.head_width}
    parts |= {"scaling": shape.scale, "attn": SimpleNamespace(attn_type="decoder")}
    norms = {"q_norm": weights.q_norm, "k_norm": weights.k_norm}
    parts |= {name: module("RMSNorm", weight=weight) for name, weight in norms.items() if weight is not None}
    mlp = {"gate_up_proj": linear(*weights.gate_up), "down_proj": linear(*weights.down_proj)}
    norms = ("input_layernorm", "post_attention_layernorm")
    return module(
        "DecoderLayer",
        self_attn=module("Attention", **parts),
        mlp=module("MLP", act_fn=module("SiluAndMul"), **mlp),
        **{name: module("RMSNorm", weight=getattr(weights, name), variance_epsilon=shape.epsilon) for name in norms},
    )


def held(model: Model) -> tuple[Any, Any]:
    """The runner and the settings of a worker that holds a model of transformers."""
    body, hf = copy.deepcopy(model.module).model, model.module.config
    cos, sin = rotation_of(body.rotary_emb, 64, model.dtype, model.device)
    half = cos.shape[-1] // 2
    tables = torch.cat([cos[:, 0, :half], sin[:, 0, :half]], dim=-1)
    layers = nn.ModuleList([layer_of(layer, tables) for layer in body.layers])
    norm = module("RMSNorm", weight=body.norm.weight.data)
    inner = module(type(model.module.model).__name__, f"models.{hf.model_type}", layers=layers, norm=norm)
    outer = module(type(model.module).__name__, f"models.{hf.model_type}", model=inner)
    runner = SimpleNamespace(get_model=lambda: outer, device=torch.device("cpu"), execute_model_state=None)
    made = settings(model_config__hf_config=hf, model_config__dtype=model.dtype)
    made.model_config.get_hidden_size = lambda: hf.hidden_size
    made.scheduler_config.max_num_batched_tokens = 256
    return runner, made


def passes(model: Model, **more: Any) -> OwnPasses:
    """Passes over a model as vLLM holds it."""
    runner, made = held(model)
    assert why_not_over(runner.get_model(), made) is None
    sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size}
    return OwnPasses(runner, made, lambda spec: Transform(*spec, **sizes, device=model.device), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_its_states_are_those_of_the_lean_decoder_on_transformers(kind: str, dtype: torch.dtype):
    model = made(kind, dtype)
    rotary = model.module.model.rotary_emb
    model.module.model.rotary_emb = type(rotary)(model.module.config)  # in float32, as in a model that was loaded
    with torch.inference_mode(), wide_products(model):  # which a pass enters by itself
        states_of_transformers = plain(model)
        by_decoder = LeanDecoder(model, LENGTH).hidden(inputs(model))
    with torch.inference_mode():
        forward = passes(model).forward(LENGTH)
        states, last = forward.hidden(inputs(model)), forward.last_hidden(inputs(model))
    assert torch.equal(states, by_decoder)
    assert torch.equal(last, states[:, -1].float())
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(states, states_of_transformers, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_of_a_gpu_between_kernels_gives_the_same_states(kind: str, monkeypatch: pytest.MonkeyPatch):
    """With what the kernels compute in torch; the last layer is for the last position alone."""
    monkeypatch.setattr(_fused, "kernels", lambda: plain_kernels)
    for name in ("runs_on", "_last_alone"):
        monkeypatch.setattr(_compiled, name, lambda *_: True)
    model = made(kind)
    with torch.inference_mode():
        forward = passes(model).forward(LENGTH)
        states, last = forward.hidden(inputs(model)), forward.last_hidden(inputs(model))
    torch.testing.assert_close(states, plain(model), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last, plain(model)[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["poc-2.0", "hardened"])
def test_what_is_published_is_that_of_the_transformers_engine(preset: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_direct_worker, "is_first_of_group", lambda: True)
    model = made("qwen3")
    round, pipeline = Round(block_hash="b", public_key="k", seq_len=8, preset=preset), get_pipeline(preset)
    ours = passes(model).begin(Spec(round, pipeline), list(range(11)), 4)
    theirs = np.concatenate(list(HFEngine(model, batch_size=4, seq_len=8).outputs(round, pipeline, range(11))))
    assert ours is not None
    assert np.abs(ours.numpy() - theirs).max() <= (2e-6 if preset == "poc-2.0" else 2e-3)


def test_no_weight_is_copied_and_new_ones_are_used_at_once():
    model = made("llama, biases")
    own = passes(model)
    body = own._runner.get_model().model
    theirs = {name: parameter.data_ptr() for name, parameter in body.layers[1].named_parameters()}
    ours = [part for part in weights_of(body.layers[1]) if part is not None]
    taken = [each for part in ours for each in (part if isinstance(part, tuple) else (part,)) if each is not None]
    assert sorted(each.data_ptr() for each in taken) == sorted(theirs.values())
    with torch.inference_mode():
        before = own.forward(LENGTH).hidden(inputs(model))
        body.layers[1].mlp.down_proj.weight.data.mul_(1.5)
        in_place = own.forward(LENGTH).hidden(inputs(model))
    replaced = nn.Parameter(body.layers[1].mlp.down_proj.weight.data / 1.5, requires_grad=False)
    body.layers[1].mlp.down_proj.weight = replaced
    with torch.inference_mode():
        after = own.forward(LENGTH).hidden(inputs(model))
    assert not torch.equal(before, in_place)
    torch.testing.assert_close(after, before)


class Recorded:
    """What stands in for a CUDA graph on a CPU: the function as it was when it was recorded, and how often it ran."""

    def __init__(self, function: Any, given: torch.Tensor, *, pool: Any, stream: Any) -> None:
        self.function, self.shape, self.pool, self.stream, self.replayed = function, given.shape, pool, stream, 0

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        assert given.shape == self.shape
        self.replayed += 1
        return self.function(given)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The recordings that are made, on what passes for a GPU."""
    found: list[Recorded] = []

    def record(*arguments: Any, **shared: Any) -> Recorded:
        found.append(Recorded(*arguments, **shared))
        return found[-1]

    monkeypatch.setattr(_compiled, "Recording", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(_compiled, "_stream", lambda device: object())
    monkeypatch.setattr(_direct_worker, "is_first_of_group", lambda: True)
    monkeypatch.setattr(OwnPasses, "_is_recorded", lambda self, count, seq_len: count * seq_len <= 32)
    return found


@pytest.mark.parametrize("preset", ["poc-2.0", "hardened"])
def test_small_passes_are_recorded_once_and_publish_the_same(preset: str, recordings: list[Recorded]):
    model, spec = made("qwen3"), spec_of(8, preset)
    own = passes(model)
    whole = own.begin(spec, list(range(11)), 11)
    assert recordings == []
    own.prepare(spec)
    assert [one.shape[0] for one in recordings] == [1, 2]
    parts = [own.begin(spec, nonces, 4) for nonces in ([0], [1, 2], [3, 4], list(range(5, 11)))]
    assert [one.shape[0] for one in recordings] == [1, 2, 4]
    assert [one.replayed for one in recordings] == [2, 4, 1]
    found = np.concatenate([part.numpy() for part in parts if part is not None])
    assert whole is not None
    assert np.abs(found - whole.numpy()).max() <= (2e-6 if preset == "poc-2.0" else 2e-3)


def test_a_pass_is_recorded_again_when_a_weight_lies_elsewhere(recordings: list[Recorded]):
    own, spec = passes(made("llama")), spec_of(8)
    body = own._runner.get_model().model
    own.begin(spec, [0], 1)
    body.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    own.begin(spec, [0], 1)
    assert len(recordings) == 1
    body.layers[1].mlp.down_proj.weight = nn.Parameter(body.layers[1].mlp.down_proj.weight.data / 1.5)
    own.begin(spec, [0], 1)
    body.norm.weight = nn.Parameter(body.norm.weight.data.clone())
    own.begin(spec, [0], 1)
    assert len(recordings) == 3


def test_recordings_share_memory_until_the_last_of_them_is_gone(recordings: list[Recorded]):
    own = passes(made("llama"))
    body = own._runner.get_model().model

    def move() -> None:
        body.norm.weight = nn.Parameter(body.norm.weight.data.clone())

    for shape in (1, 2):
        own.begin(spec_of(8), list(range(shape)), shape)
    move()
    own.begin(spec_of(8), [0], 1)  # beside the other one, which is still there
    assert len({id(one.pool) for one in recordings}) == 1
    own = passes(made("llama"))
    del recordings[:]
    body = own._runner.get_model().model
    for _ in range(3):
        own.begin(spec_of(8), [0], 1)
        move()
    assert len({id(one.pool) for one in recordings}) == 3
    assert len({id(one.stream) for one in recordings}) == 1


def test_few_recordings_are_kept(recordings: list[Recorded]):
    own = passes(made("llama"))
    lengths = range(2, 2 + _direct_worker.MAX_TABLES + 1)
    for seq_len in (*lengths, lengths[-1], lengths[0]):
        own.begin(spec_of(seq_len), [0], 1)
    assert [one.shape[1] for one in recordings] == [*lengths, lengths[0]]
    assert len(own._recorded._made) == _direct_worker.MAX_TABLES


def test_only_small_passes_on_a_gpu_are_recorded():
    own = passes(made("llama"))
    assert not own._is_recorded(1, 8)
    own._runner.device = torch.device("cuda")
    assert own._is_recorded(2, 256)
    assert own._is_recorded(15, 8)
    assert not own._is_recorded(16, 8)  # the last layer serves the last position alone
    assert not own._is_recorded(3, 256)


def change(target: str, value: Any):
    """A change of one attribute of the first layer."""

    def apply(model: Any) -> None:
        *path, name = target.split(".")
        owner = model.model.layers[0]
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    return apply


EMPTY = nn.Parameter(torch.empty(0), requires_grad=False)
OTHER = nn.Parameter(torch.zeros(64, 95), requires_grad=False)


@pytest.mark.parametrize(
    ("apply", "word"),
    [
        (change("self_attn.qkv_proj.weight", EMPTY), "packed"),
        (change("mlp.down_proj.weight", OTHER), "other shapes"),
        (change("self_attn.o_proj.weight_scale", nn.Parameter(torch.ones(1))), "self_attn.o_proj.weight_scale"),
        (change("mlp", module("MLP", act_fn=module("SiluAndMul"))), "mlp.down_proj.weight"),
        (change("ada", linear(torch.zeros(2, 2), None)), "ada.weight"),
        (change("self_attn.attn.attn_type", "encoder_only"), "looks ahead"),
        (change("self_attn.do_llama_4_scaling", True), "scaled by their position"),
        (change("self_attn.rotary_emb.rotary_dim", 8), "rotation"),
        (change("self_attn.rotary_emb.is_neox_style", False), "rotation"),
        (change("mlp.act_fn", module("GeluAndMul")), "GeluAndMul"),
        (lambda model: model.half(), "number format"),
        (lambda model: setattr(model, "model", module("LlamaModel", "models.llama")), "not known"),
        (lambda model: setattr(model, "model", None), "not known"),
    ],
)
def test_models_over_which_it_cannot_run_are_named(apply, word: str):
    runner, made_for = held(made("qwen3"))
    assert why_not_over(runner.get_model(), made_for) is None
    apply(runner.get_model())
    assert word in why_not_over(runner.get_model(), made_for)


def test_a_rotation_that_vllm_takes_in_another_way_is_named():
    own = passes(made("llama"))
    for layer in own._body.layers:
        layer.self_attn.rotary_emb.cos_sin_cache = layer.self_attn.rotary_emb.cos_sin_cache.roll(1, 0)
    with pytest.raises(ValueError, match="rotary angles"):
        own.prepare(spec_of(8))


def spec_of(seq_len: int, preset: str = "poc-2.0") -> Spec:
    return Spec(Round(block_hash="b", public_key="k", seq_len=seq_len, preset=preset), get_pipeline(preset))


def test_rounds_that_it_does_not_take_are_named():
    own = passes(made("mistral"))
    assert own.why_not(spec_of(24)) is None
    assert "longer than a step" in own.why_not(spec_of(257))
    assert "decode" in own.why_not(spec_of(24, "decode-64"))
    own._config.model_config.hf_config.sliding_window = 23
    assert "window" in own.why_not(spec_of(24))


def test_a_pass_fits_into_the_memory_of_a_step_of_the_engine():
    """Of its widest moment: four of the hidden size, and gate, up and their product."""
    model = made("llama", torch.bfloat16)
    per_position = 2 * (4 * 64 + 3 * 96)
    assert passes(model)._batch(8) == 32
    assert passes(model, activations=8 * 5 * per_position)._batch(8) == 5
    assert passes(model, activations=8 * 500 * per_position)._batch(8) == 32
    assert passes(model, activations=1)._batch(8) == 1


def test_a_worker_chooses_and_says_what_it_refused():
    runner, made_for = held(made("qwen3"))
    worker = WorkerExtension()
    worker.model_runner, worker.vllm_config = runner, made_for
    worker.assay_hooks = SimpleNamespace(_transform=lambda spec: None)
    assert worker.assay_choose("vllm") == (None, [])
    assert type(worker.assay_passes) is _direct_worker.DirectPasses
    assert worker.assay_choose("assay") == (None, ["forward assay", "sdpa"])
    assert type(worker.assay_passes) is OwnPasses
    change("self_attn.qkv_proj.weight", EMPTY)(runner.get_model())
    refused, kernels = worker.assay_choose("assay")
    assert "packed" in refused
    assert kernels == []
    assert type(worker.assay_passes) is _direct_worker.DirectPasses


def test_passes_that_return_nan_are_refused_before_there_is_a_round():
    runner, made_for = held(made("qwen3"))
    runner.get_model().model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        OwnPasses(runner, made_for, lambda spec: None).load()


PLAIN = {"model_config.architecture": "Qwen3ForCausalLM", "parallel_config.tensor_parallel_size": 1}
PLAIN |= {"model_config.enable_sleep_mode": False, "device_config.device_type": "cuda"}


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("parallel_config.tensor_parallel_size", 2, "tensor parallelism over 2"),
        ("parallel_config.pipeline_parallel_size", 2, "2 stages"),
        ("model_config.architecture", "Qwen3MoeForCausalLM", "Qwen3MoeForCausalLM"),
        ("model_config.architecture", "GraniteForCausalLM", "GraniteForCausalLM"),
        ("lora_config", SimpleNamespace(), "--enable-lora"),
        ("model_config.enable_sleep_mode", True, "--enable-sleep-mode"),
    ],
)
def test_settings_under_which_it_cannot_run_are_refused_only_where_it_is_asked_for(
    path: str, value: Any, word: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    _compatibility.check_config(settings_of_vllm(**PLAIN), forward="assay")
    changed = settings_of_vllm(**PLAIN | {path: value})
    _compatibility.check_config(changed)
    with pytest.raises(UsageError, match="ASSAY_VLLM_FORWARD=assay with") as refusal:
        _compatibility.check_config(changed, forward="assay")
    assert word in str(refusal.value)
    assert refusal.value.wanted
    assert "leave it out" in refusal.value.do


def test_a_quantised_checkpoint_and_an_older_vllm_are_refused(monkeypatch: pytest.MonkeyPatch):
    config = settings_of_vllm(**PLAIN, **{"model_config.hf_config.quantization_config": {"quant_method": "awq"}})
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    with pytest.raises(UsageError, match="a quantised checkpoint"):
        _compatibility._check_own_forward(config)
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.28.0")
    with pytest.raises(UsageError, match=r"vLLM 0\.28\.0"):
        _compatibility.check_config(settings_of_vllm(**PLAIN), forward="assay")


def test_settings_that_contradict_it_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="ASSAY_VLLM_PATH=requests"):
        ThrottleSettings(forward="assay", path="requests")
    with pytest.raises(UsageError, match="forward 'torch'"):
        ThrottleSettings(forward="torch")  # type: ignore[arg-type]
    monkeypatch.setenv("ASSAY_VLLM_FORWARD", "assay")
    assert PluginSettings().throttle.forward == "assay"
    monkeypatch.setenv("ASSAY_VLLM_INPUTS", "sent")
    with pytest.raises(UsageError, match="ASSAY_VLLM_INPUTS=sent"):
        PluginSettings()


class OwnWorkers(Workers):
    """An engine in which a nonce of a call is no request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(forward="assay", **options)
        self.throttle._unfinished = lambda: self.chat
        self.failing = 0
        self.beside = range(0)  # nonces beside which there is chat
        self.seen: list[tuple[int, int]] = []  # nonces of a call, and the chat that is counted then

    async def collective_rpc(self, method: str, args: tuple, engine: int = 0):
        if method == "assay_pass":
            nonces = args[2][engine]
            self.chat = int(nonces[-1] in self.beside)
            self.seen.append((len(nonces), self.throttle.chat))
            self.broken = self.failing > 0
            self.failing -= self.broken
        return await super().collective_rpc(method, args, engine)


async def values_of(workers: OwnWorkers, count: int) -> list[float]:
    stream = OwnStream(workers.client, spec_of(8), range(count), 8, 8)
    await stream.open()
    values: list[float] = []
    try:
        while (batch := await stream.next()) is not None:
            values += batch.tolist()
    finally:
        await stream.close()
    return values


def all_has_left(workers: OwnWorkers) -> bool:
    throttle = workers.throttle
    return throttle.in_flight == throttle.in_calls == workers.client.direct.in_flight == 0


def test_no_nonce_is_a_request_with_chat_or_without():
    """Beside chat calls have as many nonces as the throttle lets in, and chat is counted without them."""
    workers = OwnWorkers(batch=4, quiet=0.02, share=1.0)
    workers.beside = range(100, 700)
    assert asyncio.run(values_of(workers, 1200)) == list(range(1200))
    assert workers.requested == []
    beside = [size for size, chat in workers.seen if chat]
    assert len(beside) >= 8
    assert set(beside[2:]) == {workers.throttle.settings.chat_in_flight}  # two calls were under way when chat came
    assert max(size for size, _ in workers.seen[-8:]) > 8
    assert all_has_left(workers)


@pytest.mark.parametrize("failing", [1, 5])
def test_nonces_of_calls_that_failed_run_again_in_calls(failing: int):
    workers = OwnWorkers(batch=4)
    workers.failing = failing
    assert asyncio.run(values_of(workers, 64)) == list(range(64))
    assert workers.requested == []
    assert workers.client.direct.describe()["reason"] is None
    assert all_has_left(workers)


def test_nonces_that_always_fail_end_the_round_in_words_and_the_next_one_may_run():
    async def scenario(workers: OwnWorkers) -> None:
        workers.failing = 10**6
        with pytest.raises(ModelError, match="broken"):
            await values_of(workers, 64)
        assert workers.requested == []
        assert all_has_left(workers)
        workers.failing = 0
        assert await values_of(workers, 16) == list(range(16))

    asyncio.run(scenario(OwnWorkers(batch=4)))


def test_a_round_that_cannot_run_so_is_refused_and_not_run_as_requests():
    workers = OwnWorkers(batch=0)
    with pytest.raises(UsageError, match="ASSAY_VLLM_FORWARD=assay with a reason"):
        asyncio.run(values_of(workers, 64))
    assert workers.requested == workers.called == []
