"""Stages of a pipeline on the direct path, without vLLM: two workers in two threads hand on states,
and neither waits for ever where the other fails.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assay.poc.vllm.direct import DirectPasses
from tests.vllm.test_parts_direct import SPEC, config, runner

NONCES = list(range(20))
BATCH = 8
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

    def __init__(self, *, first: bool, last: bool, fails_at: int | None = None) -> None:
        self.first = first
        self.last = last
        self.fails_at = fails_at
        self.passes = 0

    def __call__(
        self, *, positions: Any, input_ids: Any, inputs_embeds: Any, intermediate_tensors: Any
    ) -> Any:
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


def passes_of(model: Layers, stages: int) -> DirectPasses:
    """The passes of a worker that has these layers."""
    settings = config(
        **{
            "parallel.pipeline_parallel_size": stages,
            "parallel.tensor_parallel_size": 1,
            "model.is_moe": False,
        }
    )
    worker = runner(settings)
    worker.model = model
    worker.execute_model_state = None
    for group in worker.attn_groups[0]:
        group.get_metadata_builder = Builder
    passes = DirectPasses(worker, settings, lambda spec: lambda rows, inputs: rows)
    assert passes.prepare(SPEC) == BATCH
    return passes


def run_stages(vllm: SimpleNamespace, models: list[Layers]) -> list[Any]:
    """What each of two stages returns of a call, or its error; nothing is left in the channel."""
    channel: Queue[dict[str, torch.Tensor]] = Queue()
    stages = []
    for stage, model in enumerate(models):
        vllm.pipeline = Pipeline(channel, stage)
        stages.append(passes_of(model, 2))

    def call(passes: DirectPasses) -> Any:
        try:
            return passes.begin(SPEC, NONCES, BATCH)
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(call, stages))
    assert channel.empty()
    return replies


def test_two_stages_have_the_values_of_one(vllm: SimpleNamespace) -> None:
    whole = passes_of(Layers(first=True, last=True), 1).begin(SPEC, NONCES, BATCH)
    models = [Layers(first=True, last=False), Layers(first=False, last=True)]
    first, last = run_stages(vllm, models)
    assert first is None
    assert (last.numpy() == whole.numpy()).all()
    assert [model.passes for model in models] == [PASSES] * 2


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
