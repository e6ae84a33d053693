"""Engines on a CPU without fast products of 16-bit numbers: bit for bit what the definition says,
and none left out.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from assay.models import precision
from assay.models.decoder import decoder_layers
from assay.models.precision import WIDE
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.engines.hf import shapes as _memory
from tests.models.narrow import Products, narrow_model


class Defined(nn.Module):
    """A linear layer as the definition has it: factors and sums in float32, the result rounded
    once.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight.float()).to(x.dtype)


def test_an_engine_computes_what_the_definition_says_and_names_it(
    small_checkpoint: Path, round_: Round, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "has_fast_products", lambda dtype: True)
    defined = narrow_model(small_checkpoint)
    for layer in decoder_layers(defined.module):
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Defined(linear))
    by_definition = HFEngine(defined, batch_size=16, seq_len=16)
    inputs = by_definition.embeddings(round_.inputs(range(16)))
    wanted = by_definition.read(inputs)
    assert WIDE not in by_definition.fingerprint.kernels

    monkeypatch.setattr(precision, "has_fast_products", lambda dtype: False)
    engine = HFEngine(narrow_model(small_checkpoint), batch_size=16, seq_len=16)
    with Products() as products:
        assert torch.equal(engine.read(inputs), wanted)
    assert products.narrow == []
    assert WIDE in engine.fingerprint.kernels


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)  # torch's, of its own compiler
@pytest.mark.usefixtures("without_fast_products")
def test_a_compiled_engine_multiplies_in_float32_too(
    small_checkpoint: Path, round_: Round, tmp_path: Path
):
    eager = HFEngine(narrow_model(small_checkpoint), batch_size=16, seq_len=16)
    compiled = HFEngine(narrow_model(small_checkpoint), batch_size=16, seq_len=16, compiled=True)
    inputs = eager.embeddings(round_.inputs(range(16)))
    compiled.read(inputs)  # compiles
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        states = compiled.read(inputs)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    kinds = {
        event["args"]["Input type"][0]
        for event in events
        if event["name"] in ("aten::mm", "aten::addmm")
    }
    assert kinds == {"float"}
    assert functional.cosine_similarity(states, eager.read(inputs)).min() > 0.999
    assert WIDE in compiled.fingerprint.kernels


@pytest.mark.slow
@pytest.mark.usefixtures("without_fast_products")
def test_tokens_are_decoded_and_replayed_without_a_narrow_product(small_checkpoint: Path):
    pipeline = get_pipeline("decode-64")
    round = Round(
        block_hash="block_alpha",
        public_key="node_A",
        preset=pipeline.name,
        seq_len=8,
        model="small",
    )
    engine = HFEngine(narrow_model(small_checkpoint), batch_size=16, seq_len=8)
    with Products() as products:
        (decoded,) = engine.run(round.inputs(range(2)), pipeline)
        (again,) = engine.run(round.inputs(range(2)), pipeline, decoded["tokens"])
    assert products.narrow == []
    assert products.wide
    assert again["margins"].max() < 0.1


@pytest.mark.usefixtures("without_fast_products")
def test_what_a_weight_takes_in_float32_is_not_free(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    model = narrow_model(small_checkpoint)
    largest = max(part.numel() for part in model.module.parameters())
    monkeypatch.setattr(
        _memory, "free_bytes", lambda device: 4 * largest + 3 * _memory.peak_bytes(model, 1, 16)
    )
    assert _memory.fitting_batch(model, 16) == 3
    monkeypatch.setattr(_memory, "free_bytes", lambda device: 4 * largest - 1)
    assert _memory.fitting_batch(model, 16) == 0
