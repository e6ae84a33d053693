"""The direct path on real engines and servers: the same bits as requests, honest, harmless to chat,
durable.
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from itertools import product

import numpy as np
import pytest
from _vllm import Server, talk

from assay import poc
from assay.models import load_model
from assay.poc import measure_frame
from assay.poc.vllm.vllm_engine import VLLMEngine
from tests.usual import enough
from tests.vllm.conftest import (
    ON_GPU,
    ONE_GPU,
    SEQ_LEN,
    SMALL,
    SMALL_ENGINE,
    break_passes,
    check_idle,
    make_round,
)
from tests.vllm.receiver import Receiver
from tests.vllm.recipe import INSTALL, RecipeServer
from tests.vllm.test_inprocess import AGREEMENT, nothing_is_held, published, replace_shape
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("forked_engines")

PRESETS = ("poc-2.0", "artifact", "hardened", "tokens-1")
DTYPES = ("float32", "bfloat16")
"""CPUs compute the second slowly: one preset shows that it has the same bits too."""
IN_FLOAT32 = enough(DTYPES, "float32")


@pytest.fixture(scope="module", params=DTYPES)
def engine(request):
    options = dict(
        SMALL_ENGINE,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
    )
    with VLLMEngine(
        "reference:qwen3", dtype=request.param, batch_size=8, seq_len=SEQ_LEN, **options
    ) as made:
        made.frame = measure_frame(load_model("reference:qwen3", device="cpu"))
        made.model = made.model.with_frame(made.frame)
        yield made


def by_path(engine, path: str, preset: str, count: int = 48) -> tuple[poc.Proof, int]:
    """Prove along one path; return the proof, and how many of its nonces ran beside the
    scheduler.
    """
    throttle = engine.client.throttle
    direct = engine.client.direct
    throttle.settings = throttle.settings.model_copy(update={"path": path})
    before = direct.nonces
    proof = poc.prove(engine.model, make_round(preset, key="paths"), range(count), engine=engine)
    throttle.settings = throttle.settings.model_copy(update={"path": "auto"})
    return proof, direct.nonces - before


@pytest.mark.skipif(
    ON_GPU, reason="on a GPU the shape of a step chooses the kernels: equal within the law"
)
@pytest.mark.parametrize("engine", IN_FLOAT32, indirect=True)
@pytest.mark.parametrize("seq_len", [9, 128])
def test_other_lengths_give_the_same_bits(engine, seq_len: int):
    """Less than a block of the cache, and whole blocks."""
    other = replace_shape(engine, seq_len=seq_len, batch_size=8)
    throttle = engine.client.throttle
    round = make_round("hardened", seq_len=seq_len)
    values = []
    before = engine.client.direct.nonces
    for path in ("auto", "requests"):
        throttle.settings = throttle.settings.model_copy(update={"path": path})
        values.append(
            np.concatenate(
                [
                    batch["vector"]
                    for batch in other.run(round.inputs(range(20)), poc.get_pipeline("hardened"))
                ]
            )
        )
    throttle.settings = throttle.settings.model_copy(update={"path": "auto"})
    assert engine.client.direct.nonces - before == 20
    assert np.array_equal(*values)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_recorded_passes_give_the_same_bits():
    """The first pass of a length is not recorded yet. In one engine: another may compile other
    kernels.
    """
    options = {"max_model_len": 512, "max_num_batched_tokens": 1024, "gpu_memory_utilization": 0.2}
    with VLLMEngine(
        "reference:qwen3", dtype="bfloat16", batch_size=8, seq_len=SEQ_LEN, **options
    ) as made:
        by_path(made, "auto", "hardened", 256)
        batch = made.client.direct.sizers[SEQ_LEN].batch
        shorter = replace_shape(made, seq_len=32, batch_size=8)
        list(
            shorter.run(
                make_round("hardened", seq_len=32).inputs(range(256)), poc.get_pipeline("hardened")
            )
        )
        before = made.counts()[0]["replayed"]  # the graph of the other length is held now
        first, *recorded = (
            published(by_path(made, "auto", "hardened", batch)[0]) for _ in range(3)
        )
        assert made.counts()[0]["replayed"] == before + 2
        assert all(np.array_equal(first, one) for one in recorded)


@pytest.mark.parametrize("engine", IN_FLOAT32, indirect=True)
def test_a_pass_that_fails_is_run_as_requests_and_the_engine_lives(
    engine, monkeypatch: pytest.MonkeyPatch
):
    expected = published(by_path(engine, "auto", "poc-2.0")[0])
    with monkeypatch.context() as patch:
        break_passes(patch, engine)
        failed, beside = by_path(engine, "auto", "poc-2.0")
    assert beside == 0
    assert engine.client.direct.describe()["reason"]
    assert np.array_equal(published(failed), expected) or ON_GPU
    assert by_path(engine, "auto", "poc-2.0")[1] == 48
    assert nothing_is_held(engine)


@pytest.mark.skipif(
    ON_GPU, reason="on a GPU the shape of a step chooses the kernels: equal within the law"
)
@pytest.mark.parametrize(
    ("engine", "preset"),
    [
        *product(DTYPES[:1], PRESETS),
        (DTYPES[1], PRESETS[0]),
        *(pytest.param(DTYPES[1], preset, marks=pytest.mark.soak) for preset in PRESETS[1:]),
    ],
    indirect=["engine"],
)
def test_both_paths_give_the_same_bits(engine, preset: str):
    direct, beside = by_path(engine, "auto", preset)
    requests, none = by_path(engine, "requests", preset)
    assert (beside, none) == (48, 0)
    assert np.array_equal(published(direct), published(requests))
    assert nothing_is_held(engine)


@pytest.mark.skipif(ONE_GPU, reason="two workers need two GPUs")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_run_the_same_batches(honest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(
        "VLLM_CPU_OMP_THREADS_BIND", "0|1"
    )  # one core each, as the CPU build of vLLM wants to be told
    options = dict(
        SMALL_ENGINE,
        seq_len=SEQ_LEN,
        max_model_len=256,
        max_num_batched_tokens=512,
        tensor_parallel_size=2,
    )
    with VLLMEngine(
        "reference:qwen3", dtype="float32", batch_size=8, enforce_eager=True, **options
    ) as engine:
        for preset in ("poc-2.0", "hardened"):
            proof, beside = by_path(engine, "auto", preset)
            theirs = poc.prove(honest, proof.header.round, range(48), batch_size=8)
            assert beside == 48
            assert np.abs(published(proof) - published(theirs)).max() <= AGREEMENT[preset]
        assert nothing_is_held(engine)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """As docs say that servers are run: compiled, in the format of the checkpoint."""
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_VLLM_QUIET": "0.2"}
    folder = tmp_path_factory.mktemp("direct")
    on_gpu = SMALL | {"--enforce-eager": False, "--dtype": "bfloat16"}
    made = (
        Server(folder, options=on_gpu, environment=environment)
        if ON_GPU
        else RecipeServer(folder, environment)
    )
    with made as running:
        yield running


def test_chat_beside_a_round_is_the_same_and_the_round_goes_on(server):
    """Chat comes while calls run, and calls come back after it."""
    assert server.get("/engine").json()["direct"]["reason"] == "no round has begun"
    alone = asyncio.run(talk(server.url, 12))
    server.begin("direct-chat")
    server.wait_for(16)
    engine = server.get("/engine").json()
    assert engine["direct"]["reason"] is None
    assert engine["direct"]["nonces"] >= 16
    beside = asyncio.run(talk(server.url, 12))
    before = server.get("/engine").json()["direct"]["nonces"]
    server.wait_for(server.checked() + 32)
    assert server.get("/engine").json()["direct"]["nonces"] > before
    server.post("/stop").raise_for_status()
    assert [one["status"] for one in beside] == [200] * 12
    assert [one["text"] for one in beside] == [one["text"] for one in alone]
    check_idle(server)


@pytest.mark.skipif(ON_GPU, reason="the commands for machines without a GPU")
def test_the_documented_installation_is_the_one_that_is_tested():
    stated = re.findall(r"(\S+)==(\S+)", INSTALL)
    assert len(stated) == 3
    assert {name: importlib.metadata.version(name).partition("+")[0] for name, _ in stated} == dict(
        stated
    )
    removed = re.findall(r"uninstall -y (.*)", INSTALL)[0].split()
    assert [name for name in removed if importlib.util.find_spec(name)] == []


@pytest.mark.skipif(ON_GPU, reason="the commands for machines without a GPU")
def test_the_documented_commands_serve_chat_and_prove(server):
    with Receiver() as receiver:
        words = server.begin_round(receiver.url)
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=server.data_dir, timeout=120, check=True
        )
        assert json.loads(done.stdout)["status"] == "OK", done.stdout
        server.wait_for(16)
        until(lambda: len(receiver.nonces("B")) >= 8, 240)
        assert {one["status"] for one in asyncio.run(talk(server.url, 4))} == {200}
        server.post("/stop").raise_for_status()
