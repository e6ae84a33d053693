"""TRL's own code that hands weights to vLLM, with engines of the same interface in place of vLLM."""

import copy
from types import SimpleNamespace

import pytest
import torch
from trl.generation.vllm_generation import VLLMGeneration

from assay.errors import UsageError
from assay.vhack import weight_svd
from assay.vhack.delta import DeltaS
from assay.vhack.training.grpo import sync_merged


class Weights:
    """A plain model that loads weights by name, as vLLM's model and TRL's client of its server do."""

    def __init__(self, module):
        self.parameters = dict(copy.deepcopy(module).named_parameters())
        self.loads = 0

    @torch.no_grad()
    def load_weights(self, weights):
        self.loads += 1
        for name, weight in weights:
            self.parameters[name].copy_(weight)

    def update_named_params(self, metadata, weights):
        received = list(weights)
        shapes = [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in received]
        assert shapes == metadata
        self.load_weights(received)

    def reset_prefix_cache(self):
        """As after every change of weights."""


def generation(module, engine, mode):
    """TRL's object without its constructor, which starts or looks for a vLLM."""
    made = object.__new__(VLLMGeneration)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=engine)))
    made.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=engine.reset_prefix_cache
    )
    made.vllm_client, made.mode, made.model, made.enable_sleep_mode = engine, mode, module, False
    made.accelerator, made._weight_metadata = SimpleNamespace(is_main_process=True), None
    made._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: torch.no_grad())
    return made


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_vllm_is_given_is_the_merged_model_bit_by_bit(model, mode, lora):
    module, engine = model.module, Weights(model.module)
    if lora:
        peft = pytest.importorskip("peft")
        module = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter = DeltaS(module, weight_svd(module))
    made = generation(module, engine, mode)
    sync_merged(SimpleNamespace(vllm_generation=made), adapter)
    for scale in (0.02, -0.05):
        with torch.no_grad():
            for parameter in adapter.delta:
                parameter.fill_(scale)
        made.sync_weights()
    assert engine.loads == 2  # one for each time, however many weights there are
    merged = adapter.merge()
    merged = merged.merge_and_unload() if lora else merged
    wanted = dict(merged.named_parameters())
    assert wanted.keys() == engine.parameters.keys()
    assert all(torch.equal(engine.parameters[name], weight) for name, weight in wanted.items())


def test_a_trainer_without_vllm_is_refused(model):
    with pytest.raises(UsageError, match="without vLLM"):
        sync_merged(SimpleNamespace(), DeltaS(model.module))
