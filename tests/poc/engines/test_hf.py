"""The engine on transformers: the shapes that it takes, its hooks, and which batches fit into
memory.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.errors import ModelError, OutOfMemory, UsageError
from assay.models import Model
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.base import Values
from assay.poc.engines.hf import shapes as _shapes
from assay.poc.engines.hf.shapes import auto_batch
from assay.poc.protocol.pipelines import get_pipeline
from tests.vhack.adapter import made
from tests.wordings import refuses


@pytest.fixture(scope="module")
def engine(small_model) -> HFEngine:
    return HFEngine(small_model, batch_size=4, seq_len=16)


def test_another_shape_is_refused(engine: HFEngine, round_: Round):
    with refuses(UsageError, "another shape is refused"):
        engine.read(engine.embeddings(round_.inputs(range(3))))


def test_hooks_between_layers_are_removed_in_the_end_and_after_an_error(
    engine: HFEngine, round_: Round
):
    inputs = engine.embeddings(round_.inputs(range(4)))
    before = engine.read(inputs)
    with engine.between_layers("signs", round_):
        assert not torch.allclose(engine.read(inputs), before, atol=1e-3)
    assert torch.equal(engine.read(inputs), before)
    with pytest.raises(RuntimeError), engine.between_layers("signs", round_):
        raise RuntimeError
    assert torch.equal(engine.read(inputs), before)


@pytest.mark.parametrize("preset", ["layer-reflections", "layer-signs"])
def test_a_run_that_waits_between_two_batches_leaves_other_runs_as_they_are(
    engine: HFEngine, round_: Round, preset: str
):
    def run(name: str) -> Iterator[Values]:
        inputs = replace(round_, preset=name).inputs(range(8))
        return engine.run(inputs, get_pipeline(name))

    alone = list(run("poc-2.0"))
    waiting = list(run(preset))
    first = run(preset)
    assert equal_values(next(first), waiting[0])
    assert all(map(equal_values, run("poc-2.0"), alone))
    assert equal_values(next(first), waiting[1])


def equal_values(some: Values, others: Values) -> bool:
    return all(np.array_equal(rows, others[name]) for name, rows in some.items())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Set the memory that seems free, in bytes."""
    return lambda amount: monkeypatch.setattr(_shapes, "free_bytes", lambda device: amount)


def test_a_model_whose_layers_read_tokens_decodes_and_runs_no_embeddings():
    """Each layer of Gemma 3n has a width of its own, and a table of embeddings."""
    layers = {"laurel_rank": 4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    widths = {"intermediate_size": [48, 64], "activation_sparsity_pattern": [0.0, 0.0]}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    module = made("Gemma3n", "TextConfig", **layers, **widths, **kinds)
    engine = HFEngine(Model(module, None, "3n", "0" * 64, "random-all"), batch_size=4, seq_len=16)
    for preset in ("poc-2.0", "decode-64"):
        round = Round(block_hash="b", public_key="k", seq_len=16, preset=preset, model="3n")
        values = engine.run(round.inputs(range(4)), get_pipeline(preset))
        if preset == "decode-64":
            assert next(values)["tokens"].shape == (4, 64)
        else:
            with pytest.raises(ModelError):
                next(values)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 8192), (16, 512), (100, 64), (128, 64)])
def test_auto_takes_a_power_of_two_that_fills_the_device(
    seq_len: int, batch_size: int, small_model, free
):
    free(2**40)
    assert auto_batch(small_model, seq_len) == batch_size


def test_auto_takes_half_of_what_is_free(small_model, free):
    one = _shapes.peak_bytes(small_model, 1, 16)
    for fitting, wanted in ((1000, 256), (64, 32), (63, 16), (2, 1), (1, 1)):
        free(fitting * one)
        assert auto_batch(small_model, 16) == wanted
    free(one - 1)
    with refuses(OutOfMemory, "auto takes half of what is free"):
        HFEngine(small_model, batch_size=auto_batch(small_model, 16), seq_len=16)


def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(small_model, free):
    free(5 * _shapes.peak_bytes(small_model, 1, 16))
    with pytest.raises(OutOfMemory) as refused:
        HFEngine(small_model, batch_size=6, seq_len=16)
    assert refused.value.do == "pass --batch-size 5"
    HFEngine(small_model, batch_size=5, seq_len=16)


@pytest.mark.parametrize("seq_len", [0, -1, 129, 10**6])
def test_a_length_that_no_model_runs_is_refused(seq_len: int, small_model):
    with pytest.raises(UsageError, match=f"seq_len {seq_len} with"):
        HFEngine(small_model, batch_size=2, seq_len=seq_len)


def test_memory_that_runs_out_in_a_forward_pass_is_answered_too(
    small_model, round_: Round, monkeypatch, free
):
    engine = HFEngine(small_model, batch_size=8, seq_len=16)

    def fail(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    # An attribute of the instance would stay after the test, as its own.
    monkeypatch.setitem(vars(small_model.module.model), "forward", fail)
    for fitting, advice in (
        (100, "pass --batch-size 4"),
        (3, "pass --batch-size 3"),
        (0, "pass --batch-size 4"),
    ):
        free(fitting * _shapes.peak_bytes(small_model, 1, 16))
        with refuses(
            OutOfMemory, "memory that runs out in a forward pass is answered too"
        ) as refused:
            prove(small_model, round_, range(8), engine=engine)
        assert refused.value.do == advice
