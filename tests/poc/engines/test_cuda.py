"""The engine on a CUDA device: bits that do not move, errors in words, and the formats of eight
bits.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from assay.errors import BadWeights, OutOfMemory
from assay.models import Model, load_model
from assay.models.decoder import backbone
from assay.models.eight_bits import CUDA_BLOCK, INT8, float8_blocks, round_linears
from assay.models.resolve import resolve
from assay.poc import HFEngine, Proof, Round, bundled_noise, prove, verify
from assay.poc.engines.hf import engine as _hf
from assay.poc.engines.hf.compiled_forward import worth_compiling
from tests.laws import QWEN3
from tests.models.storing import in_eight_bits, store
from tests.wordings import refuses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.script_method.*:DeprecationWarning"
    ),  # torch's, of its own compiler
]

PRESETS = ["poc-2.0", "artifact", "hardened"]
MIB = 2**20


STORED = {"float8-block": float8_blocks(*CUDA_BLOCK), "int8-rows": INT8}
FORMATS = [None, "float8", *STORED]


def on_cuda(reference: str = "reference:qwen3", quantise: str | None = None) -> Model:
    if quantise not in STORED:
        return load_model(reference, dtype="bfloat16", device="cuda", quantise=quantise)
    model = on_cuda(reference)
    in_eight_bits(backbone(model.module), STORED[quantise])
    return replace(model, quantised=quantise)


def bits(proof: Proof) -> list[object]:
    return [r.distance if r.vector is None else r.vector.tobytes() for r in proof.records]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("quantise", FORMATS)
def test_a_nonce_has_the_same_bits_wherever_it_stands(
    quantise: str | None, preset: str, compiled: bool
):
    model = on_cuda(quantise=quantise)
    round = Round(block_hash="b", public_key="k", preset=preset, seq_len=64)
    for batch_size in (16, 67):
        engine = HFEngine(model, batch_size=batch_size, seq_len=64, compiled=compiled)
        whole = bits(prove(model, round, range(2 * batch_size + 5), engine=engine))
        assert bits(prove(model, round, range(2 * batch_size + 5), engine=engine)) == whole
        for chosen in (range(7, 7 + batch_size), [3, batch_size - 1, 2 * batch_size]):
            assert bits(prove(model, round, chosen, engine=engine)) == [
                whole[nonce] for nonce in chosen
            ]


def mixture(quantise: str | None) -> Model:
    """A small mixture of experts with random weights."""
    sizes = {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "vocab_size": 512,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, **heads, **experts, initializer_range=0.1)
        )
    module.to("cuda", torch.bfloat16).eval()
    if quantise in STORED:
        in_eight_bits(backbone(module), STORED[quantise])
    elif quantise:
        round_linears(backbone(module))
    return Model(module, None, "mixture", "", "trained", quantise or "")


@pytest.mark.parametrize("quantise", FORMATS)
def test_a_nonce_of_a_mixture_has_the_same_bits_wherever_it_stands(quantise: str | None):
    model = mixture(quantise)
    round = Round(block_hash="b", public_key="k", seq_len=64)
    distances = []
    for compiled in (True, False):
        engine = HFEngine(model, batch_size=32, seq_len=64, compiled=compiled)
        assert ("fused" in engine.fingerprint.kernels) is compiled
        whole = prove(model, round, range(70), engine=engine)
        distances.append(whole.distances)
        for chosen in (range(7, 39), [3, 31, 64]):
            assert bits(prove(model, round, chosen, engine=engine)) == [
                bits(whole)[nonce] for nonce in chosen
            ]
    assert np.corrcoef(*distances)[0, 1] > 0.9


def test_overlapping_changes_no_bit_and_compiling_little(monkeypatch: pytest.MonkeyPatch):
    model = on_cuda()
    round = Round(block_hash="b", public_key="k", seq_len=64)
    fast = HFEngine(model, batch_size=32, seq_len=64, compiled=True)
    overlapped = prove(model, round, range(300), engine=fast)
    eager = prove(model, round, range(300), engine=HFEngine(model, batch_size=32, seq_len=64))
    assert set(verify(overlapped, model, seed=1).residuals) == {0.0}  # with the prover's kernels
    monkeypatch.setattr(_hf, "overlapped_batches", _hf.plain_batches)
    assert bits(prove(model, round, range(300), engine=fast)) == bits(overlapped)
    spread = np.std(overlapped.distances - eager.distances)
    assert 0 < spread < bundled_noise(QWEN3, "distance", "bfloat16", "bfloat16").size


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_states_that_are_not_finite_are_an_error(compiled: bool):
    model = on_cuda()
    model.module.model.norm.weight.data[0] = torch.inf
    for preset in PRESETS:
        round = Round(block_hash="b", public_key="k", preset=preset, seq_len=64)
        engine = HFEngine(model, batch_size=16, seq_len=64, compiled=compiled)
        with refuses(BadWeights, "states that are not finite are an error"):
            prove(model, round, range(20), engine=engine)


# What the names of a library's attention kernels have in common.
KERNELS = {"cudnn": "cudnn", "flash": "flash_fwd", "efficient": "fmha"}


def kernels_of(model: Model, engine: HFEngine) -> set[str]:
    """Return the names of the kernels that a proof of one batch runs."""
    round = Round(block_hash="b", public_key="k", seq_len=64)
    prove(model, round, range(4), engine=engine)  # what is compiled and recorded is not of interest
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        prove(model, round, range(4), engine=engine)
        torch.cuda.synchronize()
    return {event.name for event in seen.events()}


@pytest.mark.filterwarnings("ignore:.*Profiler clears events.*:UserWarning")
def test_the_fingerprint_names_the_kernels_that_run():
    model = on_cuda()
    assert worth_compiling(model)
    fast, plain = (
        HFEngine(model, batch_size=16, seq_len=64, compiled=compiled) for compiled in (True, False)
    )
    assert fast.fingerprint.library == plain.fingerprint.library
    before = len(plain.fingerprint.kernels)
    assert fast.fingerprint.kernels[before] == "compiled"
    assert fast.fingerprint.kernels[before + 1].startswith("triton ")
    assert fast.fingerprint.kernels[before + 2] == "fused"
    assert (plain.fingerprint.attention, plain.fingerprint.device) == (
        "sdpa",
        torch.cuda.get_device_name(),
    )
    way, attention = fast.fingerprint.attention.split(" ")
    names = kernels_of(model, fast)
    assert way == "sdpa"
    found = {library for library, word in KERNELS.items() if any(word in name for name in names)}
    assert found == {attention}, sorted(names)


@pytest.fixture
def leave() -> Iterator[object]:
    """A function that takes the memory of the device but for so many bytes; it is given back at the
    end.
    """
    held: list[torch.Tensor] = []

    def take(rest: int) -> None:
        held.clear()
        gc.collect()  # engines of other tests, with their graphs
        torch.cuda.empty_cache()
        held.append(
            torch.empty(torch.cuda.mem_get_info()[0] - rest, dtype=torch.uint8, device="cuda")
        )

    yield take
    held.clear()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(leave, compiled: bool):
    model = on_cuda()
    with refuses(OutOfMemory, "a batch that does not fit is answered with one that does"):
        HFEngine(model, batch_size=65_536, seq_len=2048, compiled=compiled)
    leave(4096 * MIB)
    with pytest.raises(OutOfMemory) as refused:
        HFEngine(model, batch_size=4096, compiled=compiled)
    named = int(refused.value.do.removeprefix("pass --batch-size "))
    assert 1 <= named < 4096
    engine = HFEngine(model, batch_size=named, compiled=compiled)
    round = Round(block_hash="b", public_key="k")
    assert len(prove(model, round, range(named), engine=engine).records) == named
    if compiled:  # the engine's graph keeps its memory, which is not free for another one
        with pytest.raises(OutOfMemory):
            HFEngine(model, batch_size=named)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_memory_that_is_gone_when_it_comes_to_it(leave, compiled: bool):
    model = on_cuda()
    round = Round(block_hash="b", public_key="k", seq_len=2048)
    engine = HFEngine(model, batch_size=128, seq_len=2048, compiled=compiled)
    leave(256 * MIB)
    with refuses(OutOfMemory, "memory that is gone when it comes to it") as refused:
        prove(model, round, range(128), engine=engine)
    assert 1 <= int(refused.value.do.removeprefix("pass --batch-size ")) <= 64
    leave(16_384 * MIB)
    assert len(prove(model, round, range(128), engine=engine).records) == 128  # the engine is whole


EVERY_PRESET = """
import json, sys
from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf.engine import be_deterministic

if sys.argv[1] == "deterministic":
    be_deterministic()
models = [load_model("reference:qwen3", dtype="bfloat16", device="cuda", quantise=q) for q in (None, "float8")]
for model, compiled in ((model, compiled) for model in models for compiled in (True, False)):
    engine = HFEngine(model, batch_size=16, seq_len=64, compiled=compiled)
    said = {"library": engine.fingerprint.as_dict()["library"]}
    for preset in ("poc-2.0", "artifact", "hardened"):
        round = Round(block_hash="b", public_key="k", preset=preset, seq_len=64)
        for name, nonces in (("whole", range(37)), ("moved", range(5, 37))):
            records = prove(model, round, nonces, engine=engine).records
            said[f"{preset} {name}"] = [r.distance if r.vector is None else r.vector.tobytes().hex() for r in records]
    print(json.dumps(said))
"""


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_kernels_made_anew_give_the_same_bits_in_every_process(tmp_path: Path):
    modes = ("deterministic", "deterministic", "plain", "plain")
    # Side by side: each takes seconds to import torch. No process finds the kernels of another.
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", EVERY_PRESET, mode],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {name: str(tmp_path / f"{index} {name}") for name in CACHES},
        )
        for index, mode in enumerate(modes)
    ]
    said = [
        [json.loads(line) for line in run.communicate(timeout=280)[0].splitlines()] for run in runs
    ]
    assert [run.returncode for run in runs] == [0, 0, 0, 0]
    assert said[2] == said[3]
    assert said[0] == said[1]
    for ours, plain in zip(said[0], said[2], strict=True):
        assert ours["library"] == f"{plain['library']}, deterministic"
        for preset in PRESETS:
            assert ours[f"{preset} moved"] == ours[f"{preset} whole"][5:]
            assert len(ours[f"{preset} whole"]) == 37


def test_eight_bit_weights_are_a_configuration_of_their_own(small_checkpoint: Path):
    round = Round(block_hash="b", public_key="k", seq_len=64)
    model, plain = (
        load_model(small_checkpoint, dtype="bfloat16", device="cuda", quantise=q)
        for q in ("float8", None)
    )
    expected = prove(plain, round, range(100), engine=HFEngine(plain, batch_size=32, seq_len=64))
    for compiled in (False, True):
        engine = HFEngine(model, batch_size=32, seq_len=64, compiled=compiled)
        proof = prove(model, round, range(100), engine=engine)
        fingerprint = proof.header.fingerprint
        assert (fingerprint.dtype, proof.header.digest) == ("float8", expected.header.digest)
        assert bits(prove(model, round, range(5, 30, 3), engine=engine)) == bits(proof)[5:30:3]
        assert (
            0 < np.std(proof.distances - expected.distances) < 0.003
        )  # rounded weights, not wrong ones
        verdict = verify(proof, plain, seed=1)
        assert (verdict.verdict, "no law" in verdict.reason) == ("undecided", True)


@pytest.mark.parametrize("form", ["block", "int8"])
def test_a_stored_checkpoint_is_proved_by_kernels_that_compute_what_its_layers_do(
    form: str, tmp_path: Path
):
    source = resolve("reference:qwen3").checkpoint
    round = Round(block_hash="b", public_key="k", seq_len=64)
    model = load_model(store(source, tmp_path / "model", form, block=128), device="cuda")
    engine = HFEngine(model, batch_size=64, seq_len=64, compiled=True)
    proof = prove(model, round, range(128), engine=engine)
    assert proof.header.fingerprint.dtype == model.quantised
    assert "fused" in proof.header.fingerprint.kernels
    eager = prove(model, round, range(128), engine=HFEngine(model, batch_size=64, seq_len=64))
    plain = on_cuda()
    unrounded = prove(plain, round, range(128), engine=HFEngine(plain, batch_size=64, seq_len=64))
    rounding = np.std(proof.distances - unrounded.distances)
    assert 0 < np.std(proof.distances - eager.distances) < 0.6 * rounding < 0.01


@pytest.mark.filterwarnings(
    "ignore:TensorFloat32:UserWarning"
)  # of the rotation, which transformers has in float32
@pytest.mark.parametrize("quantise", STORED)
def test_a_decoder_that_assay_s_kernels_do_not_serve_is_compiled(quantise: str):
    model = on_cuda(quantise=quantise)
    body = backbone(model.module)
    body.layers = body.layers[:2]
    model.module.config.num_hidden_layers = 2
    model.module.config.hidden_act = "gelu"
    for layer in body.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    round = Round(block_hash="b", public_key="k", seq_len=64)
    engine = HFEngine(model, batch_size=32, seq_len=64, compiled=True)
    proof = prove(model, round, range(70), engine=engine)
    assert {"compiled", "compiled whole", "fused"} & set(proof.header.fingerprint.kernels) == {
        "compiled whole"
    }
    assert bits(prove(model, round, range(7, 39), engine=engine)) == bits(proof)[7:39]
    eager = prove(model, round, range(70), engine=HFEngine(model, batch_size=32, seq_len=64))
    assert np.corrcoef(proof.distances, eager.distances)[0, 1] > 0.99
