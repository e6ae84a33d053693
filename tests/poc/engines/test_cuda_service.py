"""A real ``assay poc serve`` on a CUDA device: it compiles what prove compiles, and computes the same bits.

Beside the other GPU tests and not those of the service, whose fixtures need packages that a GPU machine may not have.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from assay.errors import BackendUnavailable
from assay.models import Model, load_model
from assay.poc import HFEngine, Proof, Round, prove
from assay.poc.engines.hf.compiled import worth_compiling
from tests.end_to_end.server import Server
from tests.waiting import until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's, of its own compiler
]

MODEL = "reference:qwen3"
BLOCK = {"block_hash": "b", "public_key": "k", "block_height": 1, "node_id": 0, "node_count": 1, "batch_size": 32}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    try:
        import assay.poc.service  # noqa: F401
    except BackendUnavailable as error:
        pytest.skip(error.seen)
    made = Server(tmp_path, "--dtype", "bfloat16", model=MODEL, fork=False)
    made.start()
    try:
        made.wait_for(timeout=120)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(MODEL, dtype="bfloat16", device="cuda")


def proved(model: Model, preset: str, count: int) -> Proof:
    assert worth_compiling(model)
    engine = HFEngine(model, batch_size=32, compiled=True)
    round = Round(block_hash="b", public_key="k", preset=preset)
    return prove(model, round, range(count), engine=engine)


def test_a_round_and_a_job_have_the_bits_of_prove(server: Server, model: Model):
    server.post("/init/generate", BLOCK | {"r_target": 2.0})
    answers = []

    def generated() -> bool:
        answers.append(server.call("GET", "/health")[0])  # while kernels are compiled too
        return server.status()["total_checked"] >= 128

    until(generated, 120)
    assert set(answers) == {200}
    server.post("/phase/validate")
    found = server.call("GET", "/api/v1/pow/status?after=-1&limit=128")[1]
    assert (found["error"], found["valid_nonces"]) == (None, list(range(128)))
    assert found["valid_distances"] == proved(model, "poc-2.0", 128).distances.tolist()
    assert "compiles its kernels" in server.log.read_text()

    server.post("/stop")
    params = {"model": MODEL, "seq_len": 256, "k_dim": 12}
    queued = server.post("/generate", BLOCK | {"nonces": list(range(40)), "params": params, "wait": False})
    path = f"/api/v1/pow/generate/{queued['request_id']}"
    until(lambda: server.get(path)["status"] in ("completed", "failed"), 120)
    job = server.get(path)
    assert job["status"] == "completed", job
    vectors = [base64.b64decode(row["vector_b64"]) for row in job["artifacts"]]
    assert vectors == [record.vector.tobytes() for record in proved(model, "artifact", 40).records]
    assert server.terminate() == 0
