"""Passes of the direct path without vLLM: their size, their CUDA graph, their cache, and stages of a
pipeline, two workers in two threads, of which neither waits for ever where the other fails.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typing_extensions import override

from assay.poc.vllm.direct_passes import DirectPasses
from tests.vllm.test_parts_direct import SPEC, config, runner

NONCES = list(range(20))
BATCH = 8
PER_TOKEN = 4 * (2 * 8 + 16)  # bytes of keys and values of two heads, and of an input, in float32
PASSES = 3
WAIT = 60.0  # seconds, after which a stage counts as one that waits for ever


class Pipeline:
    """vLLM's group of stages, as one of its two workers sees it."""

    def __init__(self, channel: "Queue[dict[str, torch.Tensor]]", stage: int) -> None:
        self.is_first_rank = stage == 0
        self.is_last_rank = stage == 1
        self.channel = channel

    def isend_tensor_dict(self, tensors: dict[str, torch.Tensor], **settings: Any) -> list[Any]:
        self.channel.put(tensors)
        return [SimpleNamespace(wait=lambda: None)] * 2

    def recv_tensor_dict(self, **settings: Any) -> dict[str, torch.Tensor]:
        return self.channel.get(timeout=WAIT)


class Builder:
    """Makes the metadata of a kernel of attention."""

    kv_cache_spec: Any = None
    layer_names = ("layer0", "layer1")

    def __init__(self, *settings: Any) -> None: ...

    def build(self, prefix: int, common: Any, *, fast_build: bool) -> str:
        return "metadata"


class IntermediateTensors:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors


class Layers:
    """Half of a model, or all of it, that fails in one of its passes."""

    def __init__(
        self, *, first: bool = True, last: bool = True, fails_at: int | None = None
    ) -> None:
        self.first = first
        self.last = last
        self.fails_at = fails_at
        self.passes = 0
        self.layers: list[Any] = []  # of attention, as vLLM knows them
        self.caches: list[torch.Tensor] = []  # that they had in the last pass

    def __call__(
        self, *, positions: Any, input_ids: Any, inputs_embeds: Any, intermediate_tensors: Any
    ) -> Any:
        self.caches = [layer.kv_cache for layer in self.layers]
        if self.passes == self.fails_at:
            raise RuntimeError("no memory")
        self.passes += 1
        if self.first:
            states = {"hidden_states": torch.sin(inputs_embeds.float()), "residual": inputs_embeds}
        else:
            states = intermediate_tensors.tensors
        if self.last:
            return torch.cos(states["hidden_states"] + states["residual"].float())
        return IntermediateTensors(states)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The names of vLLM that passes import; `pipeline` is the group of the next worker."""
    distributed = SimpleNamespace(
        get_pp_group=lambda: distributed.pipeline,
        get_tp_group=lambda: SimpleNamespace(is_first_rank=True),
    )
    modules = {
        "vllm": SimpleNamespace(),
        "vllm.distributed": distributed,
        "vllm.sequence": SimpleNamespace(IntermediateTensors=IntermediateTensors),
        "vllm.forward_context": SimpleNamespace(
            set_forward_context=lambda *settings, **others: nullcontext()
        ),
        "vllm.config": SimpleNamespace(set_current_vllm_config=lambda config: nullcontext()),
        "vllm.v1": SimpleNamespace(),
        "vllm.v1.attention": SimpleNamespace(),
        "vllm.v1.attention.backend": SimpleNamespace(CommonAttentionMetadata=SimpleNamespace),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return distributed


def passes_of(
    model: Any,
    stages: int = 1,
    *,
    activations: int = 0,
    seq_len: int = SPEC.round.seq_len,
    engines: int = 1,
) -> tuple[DirectPasses, int]:
    """The passes of a worker that has these layers, prepared, and the nonces of a whole one."""
    settings = config(
        **{
            "parallel.pipeline_parallel_size": stages,
            "parallel.tensor_parallel_size": 1,
            "parallel.data_parallel_size": engines,
            "model.is_moe": False,
        }
    )
    worker = runner(settings)
    worker.model = model
    worker.execute_model_state = None
    for group in worker.attn_groups[0]:
        group.get_metadata_builder = Builder
    model.layers = list(settings.compilation_config.static_forward_context.values())
    passes = DirectPasses(
        worker, settings, lambda spec: lambda rows, inputs: rows, activations=activations
    )
    round = replace(SPEC.round, seq_len=seq_len)
    return passes, passes.prepare(SPEC._replace(round=round))


def run_stages(vllm: SimpleNamespace, models: list[Layers]) -> list[Any]:
    """What each of two stages returns of a call, or its error; nothing is left in the channel."""
    channel: Queue[dict[str, torch.Tensor]] = Queue()
    stages = []
    for stage, model in enumerate(models):
        vllm.pipeline = Pipeline(channel, stage)
        stages.append(passes_of(model, 2)[0])

    def call(passes: DirectPasses) -> Any:
        try:
            return passes.begin(SPEC, NONCES, BATCH, NONCES)
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(call, stages))
    assert channel.empty()
    return replies


def test_two_stages_have_the_values_of_one(vllm: SimpleNamespace) -> None:
    whole = passes_of(Layers())[0].begin(SPEC, NONCES, BATCH, NONCES)
    models = [Layers(first=True, last=False), Layers(first=False, last=True)]
    first, last = run_stages(vllm, models)
    assert first is None
    assert (last.numpy() == whole.numpy()).all()
    assert [model.passes for model in models] == [PASSES] * 2


@pytest.mark.parametrize("count", [0, 3, 2 * BATCH + 1])
def test_engines_that_step_together_run_as_many_passes_whatever_their_shares(
    vllm: SimpleNamespace, count: int
) -> None:
    share = [100 + place for place in range(count)]
    alone = passes_of(Layers())[0].begin(SPEC, share, BATCH, share) if share else None
    model = Layers()
    together = passes_of(model, engines=2)[0].begin(SPEC, share, BATCH, NONCES)
    assert model.passes == PASSES
    assert (together is None) == (alone is None)
    if alone is not None and together is not None:
        assert (together.numpy() == alone.numpy()).all()


def test_an_engine_without_room_for_its_cache_is_not_ready(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would leave engines that step with it waiting in the layers that it cannot run."""
    passes = passes_of(Layers(), engines=2)[0]
    assert passes.ready

    def make_none(*shape: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty_permuted", make_none)
    with pytest.raises(torch.OutOfMemoryError):
        passes.prepare(SPEC._replace(round=replace(SPEC.round, seq_len=9)))
    assert not passes.ready


def test_a_cache_is_never_smaller_than_streams_need_that_began_before_there_was_no_room(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Layers()
    passes, batch = passes_of(model, seq_len=9)
    long = SPEC._replace(round=replace(SPEC.round, seq_len=9))
    passes.begin(long, NONCES, batch, NONCES)
    blocks = len(model.caches[0])
    with monkeypatch.context() as full:
        full.setattr(torch, "empty_permuted", lambda *shape, **settings: torch.empty(-1))
        with pytest.raises(RuntimeError):
            passes.prepare(SPEC._replace(round=replace(SPEC.round, seq_len=5)))
    passes.prepare(SPEC)
    passes.begin(long, NONCES, batch, NONCES)
    assert len(model.caches[0]) == blocks


def test_an_engine_that_fails_in_a_pass_still_runs_those_that_others_wait_for(
    vllm: SimpleNamespace,
) -> None:
    class Failing(Layers):
        tried = 0

        def __call__(self, **inputs: Any) -> Any:
            self.tried += 1
            return super().__call__(**inputs)

    model = Failing(fails_at=0)
    with pytest.raises(RuntimeError):
        passes_of(model, engines=2)[0].begin(SPEC, NONCES, BATCH, NONCES)
    assert model.tried == PASSES


def test_an_engine_ends_where_others_wait_within_a_pass_for_layers_that_failed(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", end)
    model = Layers(fails_at=1)
    with pytest.raises(SystemExit) as ended:
        passes_of(model, engines=2)[0].begin(SPEC, NONCES, BATCH, NONCES)
    assert ended.value.code == 1
    assert model.passes == 1


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("fails_at", range(PASSES))
def test_a_stage_that_fails_in_a_pass_leaves_no_other_waiting(
    vllm: SimpleNamespace, stage: int, fails_at: int
) -> None:
    models = [
        Layers(first=place == 0, last=place == 1, fails_at=fails_at if place == stage else None)
        for place in range(2)
    ]
    replies = run_stages(vllm, models)
    assert str(replies[stage]) == "no memory"
    # The first stage does not hear of a later one; the last one, which answers, hears of all.
    heard = ["the stage before failed"] if stage == 0 else [str(None)]
    assert [str(replies[1 - stage])] == heard
    assert models[stage].passes == fails_at


@pytest.mark.parametrize(
    ("seq_len", "activations", "batch"),
    [(8, 0, 8), (64, 0, 1), (63, 0, 1), (2, 0, 16), (5, 0, 12), (8, 64 * PER_TOKEN, 4)],
)
def test_a_pass_fits_into_a_step_and_its_cache_into_the_memory_of_one(
    seq_len: int, activations: int, batch: int
) -> None:
    assert passes_of(Layers(), activations=activations, seq_len=seq_len)[1] == batch


@pytest.mark.parametrize(
    ("on_gpu", "works", "free"),
    [(True, True, 2**30), (True, False, 2**30), (True, True, 100), (False, True, 2**30)],
)
def test_whole_passes_are_recorded_where_that_works(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, works: bool, free: int
) -> None:
    class Recorded:
        def __init__(self, run: Any, inputs: Any) -> None:
            if not works:
                raise AssertionError("a kernel waits")
            self.run = run

        def __call__(self, inputs: Any) -> torch.Tensor:
            states_ND: torch.Tensor = self.run(inputs)
            return states_ND

    if on_gpu:
        monkeypatch.setattr("assay.poc.vllm.direct_passes.may_record", lambda runner, config: True)
    monkeypatch.setattr("assay.poc.vllm.direct_passes.PassGraph", Recorded)
    monkeypatch.setattr("assay.poc.vllm.direct_passes.free_bytes", lambda device: free)
    model = Layers()
    passes, batch = passes_of(model, activations=64 * PER_TOKEN)
    # Two whole passes and a rest, then a whole one: the first of all is recorded.
    for nonces in (NONCES[: 2 * batch + 3], NONCES[:batch]):
        passes.begin(SPEC, nonces, batch, nonces)
    assert model.passes == 4
    assert passes.replayed == (2 if on_gpu and works and free > 100 else 0)


def test_every_layer_has_its_own_cache_again_after_a_pass_that_failed(
    vllm: SimpleNamespace,
) -> None:
    model = Layers(fails_at=0)
    passes, _ = passes_of(model)
    own_caches = [layer.kv_cache for layer in model.layers]
    with pytest.raises(RuntimeError, match="no memory"):
        passes.begin(SPEC, NONCES, BATCH, NONCES)
    private_cache = model.caches[0]
    assert all(cache is private_cache for cache in model.caches)
    assert all(layer.kv_cache is own for layer, own in zip(model.layers, own_caches, strict=True))


class Spoiling(Layers):
    """Layers that leave NaN in their cache, and remember whether they met any."""

    met: tuple[bool, ...] = ()

    @override
    def __call__(self, **inputs: Any) -> Any:
        cache = self.layers[0].kv_cache
        self.met += (bool(cache.isnan().any()),)
        cache.fill_(torch.nan)
        return super().__call__(**inputs)


@pytest.mark.parametrize(("seq_len", "met"), [(6, False), (8, True)])
def test_a_cache_begins_with_zeros_where_a_block_is_not_filled(
    vllm: SimpleNamespace, seq_len: int, met: bool
) -> None:
    """What an earlier pass has left behind the last position would come through a kernel."""
    model = Spoiling()
    passes, batch = passes_of(model, seq_len=seq_len)
    spec = SPEC._replace(round=replace(SPEC.round, seq_len=seq_len))
    nonces = NONCES[: 2 * batch]
    passes.begin(spec, nonces, batch, nonces)
    assert model.met == (False, met)
