"""The engine on transformers: its inputs and seed texts, what it reads, and which batches fit into memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assay import streams
from assay.errors import OutOfMemory, UsageError
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf import engine as _hf
from assay.poc.engines.hf.engine import auto_batch
from assay.poc.protocol.transforms import project

NUMPY = streams.get_backend("numpy")


@pytest.fixture(scope="module")
def engine(small_model) -> HFEngine:
    return HFEngine(small_model, batch_size=4, seq_len=16)


def test_inputs_are_the_stream_in_row_major_order(engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, [0, 5])
    for row, nonce in enumerate((0, 5)):
        expected = NUMPY.normals(streams.seeds([f"block_alpha_node_A_nonce{nonce}"]), 16 * 64)[0].reshape(16, 64)
        np.testing.assert_array_equal(inputs[row].numpy(), expected)
    strong = engine.inputs(replace(round_, strength=256), [0])
    expected = NUMPY.normals(streams.seeds(["block_alpha_node_A_nonce0"], 256), 16 * 64)[0].reshape(16, 64)
    np.testing.assert_array_equal(strong[0].numpy(), expected)


def test_without_weights_the_last_token_is_read_after_the_final_norm(engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, range(4))
    with torch.inference_mode():
        plain = engine.model.module.model(inputs_embeds=inputs).last_hidden_state[:, -1].float()
    torch.testing.assert_close(engine.read(inputs), plain, atol=1e-6, rtol=0)


def test_another_shape_is_refused(engine: HFEngine, round_: Round):
    with pytest.raises(UsageError, match="fixed shape"):
        engine.read(engine.inputs(round_, range(3)))


def test_hooks_between_layers_are_removed_in_the_end_and_after_an_error(engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, range(4))
    before = engine.read(inputs)
    with engine.between_layers("signs", round_):
        assert not torch.allclose(engine.read(inputs), before, atol=1e-3)
    assert torch.equal(engine.read(inputs), before)
    with pytest.raises(RuntimeError), engine.between_layers("signs", round_):
        raise RuntimeError
    assert torch.equal(engine.read(inputs), before)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 9, 11, 32])
def test_a_projected_row_does_not_depend_on_its_place(rows: int):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(300, 64, generator=generator)
    torch.testing.assert_close(project(x, weight), x @ weight.T, atol=1e-4, rtol=1e-5)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(project(x[order], weight), project(x, weight)[order])


def test_fingerprints_tell_engines_apart(small_model):
    first = HFEngine(small_model, batch_size=4, seq_len=16).fingerprint
    assert first == HFEngine(small_model, batch_size=4, seq_len=16).fingerprint
    others = [HFEngine(small_model, batch_size=8, seq_len=16), HFEngine(small_model, batch_size=4, seq_len=32)]
    assert len({first.id, *(engine.fingerprint.id for engine in others)}) == 3
    assert first.dtype == "float32"
    assert first.attention == "sdpa"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Set the memory that seems free, in bytes."""
    return lambda amount: monkeypatch.setattr(_hf, "free_bytes", lambda device: amount)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 8192), (16, 512), (100, 64), (128, 64)])
def test_auto_takes_a_power_of_two_that_fills_the_device(seq_len: int, batch_size: int, small_model, free):
    free(2**40)
    assert auto_batch(small_model, seq_len) == batch_size


def test_auto_takes_half_of_what_is_free(small_model, free):
    one = _hf.peak_bytes(small_model, 1, 16)
    for fitting, wanted in ((1000, 256), (64, 32), (63, 16), (2, 1), (1, 1)):
        free(fitting * one)
        assert auto_batch(small_model, 16) == wanted
    free(one - 1)
    with pytest.raises(OutOfMemory, match="--seq-len"):
        HFEngine(small_model, batch_size=auto_batch(small_model, 16), seq_len=16)


def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(small_model, free):
    free(5 * _hf.peak_bytes(small_model, 1, 16))
    with pytest.raises(OutOfMemory) as refused:
        HFEngine(small_model, batch_size=6, seq_len=16)
    assert refused.value.do == "pass --batch-size 5"
    HFEngine(small_model, batch_size=5, seq_len=16)


@pytest.mark.parametrize("seq_len", [0, -1, 129, 10**6])
def test_a_length_that_no_model_runs_is_refused(seq_len: int, small_model):
    with pytest.raises(UsageError, match=f"seq_len {seq_len} with"):
        HFEngine(small_model, batch_size=2, seq_len=seq_len)


def test_memory_that_runs_out_in_a_forward_pass_is_answered_too(small_model, round_: Round, monkeypatch, free):
    engine = HFEngine(small_model, batch_size=8, seq_len=16)

    def fail(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    # An attribute of the instance would stay after the test, as its own.
    monkeypatch.setitem(vars(small_model.module.model), "forward", fail)
    for fitting, advice in ((100, "pass --batch-size 4"), (3, "pass --batch-size 3"), (0, "pass --batch-size 4")):
        free(fitting * _hf.peak_bytes(small_model, 1, 16))
        with pytest.raises(OutOfMemory, match="8 × 16 positions") as refused:
            prove(small_model, round_, range(8), engine=engine)
        assert refused.value.do == advice


def test_what_graphs_keep_for_their_replay_is_not_free(small_model, free, monkeypatch: pytest.MonkeyPatch):
    one = _hf.peak_bytes(small_model, 1, 16)
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 7 * one, "allocated_size": one},
        {"device": 0, "segment_pool_id": (0, 2), "total_size": 5 * one, "allocated_size": 2 * one},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 9 * one, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    free(20 * one)
    assert [_hf._free(torch.device(name)) // one for name in ("cpu", "cuda", "cuda:0", "cuda:1")] == [20, 17, 17, 11]
