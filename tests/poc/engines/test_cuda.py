"""The engine on a CUDA device: bits that do not move, errors in words, and the formats of eight bits."""

import numpy as np
import pytest
import torch

from assay.errors import BadWeights, CalibrationError, OutOfMemory
from assay.models import Model, load_model
from assay.poc import HFEngine, Proof, Round, default_noise, prove, verify
from assay.poc.engines import _hf, auto_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(reference: str = "reference:qwen3") -> Model:
    return load_model(reference, dtype="bfloat16", device="cuda")


def bits(proof: Proof) -> list[object]:
    return [r.distance if r.vector is None else r.vector.tobytes() for r in proof.records]


@pytest.mark.parametrize("preset", ["poc-2.0", "artifact", "hardened"])
def test_a_nonce_has_the_same_bits_wherever_it_stands(preset: str):
    model = on_cuda()
    round = Round(block_hash="b", public_key="k", preset=preset, seq_len=64)
    for batch_size in (16, 67):
        engine = HFEngine(model, batch_size=batch_size, seq_len=64, compiled=True)
        whole = bits(prove(model, round, range(2 * batch_size + 5), engine=engine))
        assert bits(prove(model, round, range(2 * batch_size + 5), engine=engine)) == whole
        for chosen in (range(7, 7 + batch_size), [3, batch_size - 1, 2 * batch_size]):
            assert bits(prove(model, round, chosen, engine=engine)) == [whole[nonce] for nonce in chosen]


def test_overlapping_changes_no_bit_and_compiling_little(monkeypatch: pytest.MonkeyPatch):
    model = on_cuda("reference:llama")
    round = Round(block_hash="b", public_key="k", seq_len=64)
    fast = HFEngine(model, batch_size=32, seq_len=64, compiled=True)
    overlapped = prove(model, round, range(300), engine=fast)
    eager = prove(model, round, range(300), engine=HFEngine(model, batch_size=32, seq_len=64))
    assert verify(overlapped, model, seed=1).residuals == (0.0,) * 64  # with the prover's kernels
    plain = lambda engine, run, *given: _hf.plain_outputs(engine, *given)  # noqa: E731
    monkeypatch.setattr(_hf, "overlapped_outputs", plain)
    assert bits(prove(model, round, range(300), engine=fast)) == bits(overlapped)
    spread = np.std(overlapped.distances - eager.distances)
    assert 0 < spread < default_noise("distance", "bfloat16", "bfloat16").size
    assert fast.fingerprint.attention.startswith("sdpa ")


def test_states_that_are_not_finite_are_an_error():
    model = on_cuda()
    model.module.model.norm.weight.data[0] = torch.inf
    for preset in ("poc-2.0", "artifact", "hardened"):
        round = Round(block_hash="b", public_key="k", preset=preset, seq_len=16)
        with pytest.raises(BadWeights, match="NaN"):
            prove(model, round, range(20), engine=HFEngine(model, batch_size=16, seq_len=16))


def test_out_of_memory_names_a_batch_that_fits():
    model = on_cuda()
    with pytest.raises(OutOfMemory, match=r"--batch-size (\d+)") as refused:
        HFEngine(model, batch_size=65_536, seq_len=2048)
    named = int(refused.value.do.split()[-1])
    assert 1 <= named < 65_536
    HFEngine(model, batch_size=named, seq_len=2048)
    assert auto_batch(model, 256) == 128
    assert auto_batch(model, 2048) == 16
    # What the estimate lets through, and the device has no longer when it comes to it.
    engine = HFEngine(model, batch_size=128, seq_len=2048)
    held = torch.empty(torch.cuda.mem_get_info()[0] - 2**29, dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemory, match="--batch-size"):
        prove(model, Round(block_hash="b", public_key="k", seq_len=2048), range(128), engine=engine)
    del held


def test_eight_bit_weights_are_a_configuration_of_their_own():
    pytest.importorskip("torchao")
    round = Round(block_hash="b", public_key="k", seq_len=64)
    plain = prove(on_cuda(), round, range(100), batch_size=32)
    for kind in ("int8", "float8"):
        model = load_model("reference:qwen3", device="cuda", quantise=kind)
        engine = HFEngine(model, batch_size=32, seq_len=64)
        proof = prove(model, round, range(100), engine=engine)
        assert (proof.header.fingerprint.dtype, proof.header.digest) == (kind, plain.header.digest)
        assert bits(prove(model, round, range(5, 30, 3), engine=engine)) == bits(proof)[5:30:3]
        with pytest.raises(CalibrationError, match=f"no default noise between {kind}"):
            verify(proof, on_cuda(), seed=1)
