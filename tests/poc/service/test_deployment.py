"""The engines of a deployed model: which kernels they run, how long they are kept, what the service
makes of them.
"""

import pytest
import torch

from assay.errors import OutOfMemory, UsageError
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf import shapes as _memory
from assay.poc.engines.hf.engine import is_compiled
from assay.poc.net import deployment as _deployment
from assay.poc.net.deployment import Deployment
from tests.poc.service.conftest import BLOCK, ROUND
from tests.waiting import until
from tests.wordings import refuses

SHAPE = (16, 8)  # positions, nonces


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Compile by doing nothing, which takes no minutes; what was compiled is in the list."""
    seen: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: seen.append(function) or function)
    return seen


@pytest.mark.parametrize("worth", [True, False])
def test_kernels_are_chosen_as_prove_chooses_them(
    worth: bool, unhooked_model, compiling, monkeypatch
):
    monkeypatch.setattr(_deployment, "worth_compiling", lambda model: worth)
    assert is_compiled(Deployment.of(unhooked_model).engine(*SHAPE).fingerprint) is worth
    assert (
        is_compiled(Deployment.of(unhooked_model, compiled=not worth).engine(*SHAPE).fingerprint)
        is not worth
    )
    assert compiling


def test_the_latest_engines_are_kept(unhooked_model):
    make = Deployment.of(unhooked_model).engine
    first = make(*SHAPE)
    assert (first.seq_len, first.batch_size) == SHAPE
    assert make(16, 4) is not first
    assert make(*SHAPE) is first
    make(16, 5)  # the third: that of four nonces was used longest ago
    assert make(*SHAPE) is first
    make(16, 4)
    make(16, 5)
    assert make(*SHAPE) is not first


def test_only_so_many_shapes_are_compiled(unhooked_model, compiling, monkeypatch):
    monkeypatch.setattr(_deployment, "COMPILED_SHAPES", 2)
    make = Deployment.of(unhooked_model, compiled=True).engine
    kernels = {size: is_compiled(make(16, size).fingerprint) for size in (4, 5, 6, 7)}
    assert kernels == {4: True, 5: True, 6: False, 7: False}
    # One that was not kept, and comes again, has the kernels that it had.
    assert is_compiled(make(16, 4).fingerprint)
    assert not is_compiled(make(16, 6).fingerprint)


def test_a_shape_that_is_refused_takes_no_place(unhooked_model, compiling, monkeypatch):
    monkeypatch.setattr(_deployment, "COMPILED_SHAPES", 1)
    make = Deployment.of(unhooked_model, compiled=True).engine
    with refuses(UsageError, "a shape that is refused takes no place"):
        make(129, 8)
    with monkeypatch.context() as patch:
        patch.setattr(_memory, "free_bytes", lambda device: 0)
        with pytest.raises(OutOfMemory):
            make(*SHAPE)
    assert is_compiled(make(*SHAPE).fingerprint)


def test_a_service_on_compiled_kernels_computes_what_prove_computes(
    rig, serving, unhooked_model, compiling
):
    rig.deployment = lambda: Deployment.of(unhooked_model, compiled=True)
    shape = {"seq_len": 16, "batch_size": 8}
    with serving(seq_len=16) as service:
        service.post("/init/generate", ROUND | shape | {"r_target": 2.0})
        until(lambda: service.checked() >= 40)
        service.post("/phase/validate")
        found = service.status()
        asked = {"nonces": [3, 11, 12], "dist": [1.4] * 3, "node_id": 0}
        judged = service.post("/validate", BLOCK | asked)
    engine = HFEngine(unhooked_model, **shape, compiled=True)
    round = Round(block_hash=BLOCK["block_hash"], public_key=BLOCK["public_key"], seq_len=16)
    proof = prove(unhooked_model, round, range(max(found["valid_nonces"]) + 1), engine=engine)
    assert found["valid_distances"] == [proof.distances[nonce] for nonce in found["valid_nonces"]]
    assert judged["computed_distances"] == [proof.distances[nonce] for nonce in asked["nonces"]]
    # The round's engine was made once for all requests, and one beside it here.
    assert len(compiling) == 2
