"""The compiled engine: the same states in other kernels, named in the fingerprint."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor import config as inductor

from assay.errors import CalibrationError, ModelError
from assay.poc import HFEngine, Proof, Round, calibrate, judging_setup, prove, verify
from assay.poc import verifier as _verifier
from assay.poc.engines.hf import compiled_forward
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import be_deterministic, is_compiled
from tests.usual import usual
from tests.wordings import refuses


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled engine's way through the code, without the minutes that the compiler takes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize(
    "preset", ["poc-2.0", "artifact", "hardened", "layer-reflections", "random-head"]
)
def test_every_kind_of_pipeline_runs_on_it(preset: str, unhooked_model, round_: Round, uncompiled):
    round = replace(round_, preset=preset)
    fast = HFEngine(unhooked_model, batch_size=8, seq_len=16, compiled=True)
    ours, theirs = (
        prove(unhooked_model, round, range(19), engine=e)
        for e in (fast, HFEngine(unhooked_model, batch_size=8, seq_len=16))
    )
    for mine, other in zip(ours.records, theirs.records, strict=True):
        if mine.vector is None:
            assert mine.distance == pytest.approx(other.distance, abs=2e-6)
        else:
            np.testing.assert_allclose(
                mine.vector.astype(float), other.vector.astype(float), atol=2e-3
            )
    assert verify(ours, unhooked_model, seed=1).verdict == "honest"


@pytest.mark.parametrize("kernels", usual(("compiled", "eager"), "eager"))
@pytest.mark.parametrize("node", ["hf", "vllm"])
@pytest.mark.parametrize("batch_size", usual((4, 8), 4))
def test_a_calibration_chooses_the_batch_and_the_kernels_of_the_validator(
    node: str,
    kernels: str,
    batch_size: int,
    unhooked_model,
    round_: Round,
    uncompiled,
    monkeypatch: pytest.MonkeyPatch,
):
    """A proof of vLLM names no kernels, and ``prove`` compiles beside it; one of transformers names
    the node's.
    """
    shape: dict[str, Any] = {"batch_size": batch_size, "seq_len": 16}
    compiled, eager = (
        HFEngine(unhooked_model, **shape, compiled=choice) for choice in (True, False)
    )
    far = prove(unhooked_model, round_, range(256), engine=eager)
    records = [
        replace(one, distance=one.distance + (-1) ** one.nonce * 1e-5) for one in far.records
    ]
    fingerprint = replace(
        eager.fingerprint, engine=node, batch_size=8, library="another", kernels=("compiled",)
    )
    theirs = Proof.build(replace(far.header, fingerprint=fingerprint), records, 1.0)
    measured = compiled if kernels == "compiled" else eager
    calibration = calibrate(theirs, prove(unhooked_model, round_, range(256), engine=measured))
    monkeypatch.setattr(_verifier, "worth_compiling", lambda model: True)
    engine, _ = judging_setup(theirs.header, unhooked_model, calibration=calibration)
    assert engine.fingerprint == measured.fingerprint
    assert verify(theirs, unhooked_model, seed=1, calibration=calibration).verdict == "honest"
    engine, _ = judging_setup(theirs.header, unhooked_model)
    assert (engine.batch_size, is_compiled(engine.fingerprint)) == (8, node == "hf")
    for wrong in (None, measured):
        other = replace(measured.fingerprint, device="another", engine="hf")
        header = replace(far.header, fingerprint=replace(other, kernels=()))
        law = calibrate(theirs, Proof.build(header, far.records, 1.0))
        with refuses(
            CalibrationError, "a calibration chooses the batch and the kernels of the validator"
        ):
            judging_setup(theirs.header, unhooked_model, calibration=law, engine=wrong)


def test_a_compiler_that_fails_is_answered_with_the_other_kernels(
    unhooked_model, round_: Round, monkeypatch
):
    def compiled(function, **_):
        def fail(*_, **__):
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    engine = HFEngine(unhooked_model, batch_size=8, seq_len=16, compiled=True)
    with refuses(ModelError, "a compiler that fails is answered with the other kernels") as refused:
        prove(unhooked_model, round_, range(8), engine=engine)
    assert "--kernels eager" in refused.value.do


def test_the_fingerprint_names_it(unhooked_model, uncompiled):
    assert not worth_compiling(unhooked_model)  # by itself, on a CPU
    eager = HFEngine(unhooked_model, batch_size=8, seq_len=16).fingerprint
    compiled = HFEngine(unhooked_model, batch_size=8, seq_len=16, compiled=True).fingerprint
    assert (compiled.library, compiled.kernels) == (
        eager.library,
        (*eager.kernels, "compiled whole"),
    )
    assert is_compiled(compiled)
    assert not is_compiled(eager)
    assert not is_compiled(replace(compiled, engine="vllm"))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)  # torch's, of its own compiler
def test_no_setting_of_the_process_chooses_kernels_by_timing(
    unhooked_model, round_: Round, monkeypatch
):
    """Dynamo traces for real, all functions of the decoder; only the kernels are not made."""
    from torch._inductor.compile_fx import compile_fx

    seen = []

    def uncompiled_inner(graph, inputs, **_):
        seen.append({name: getter() for name, getter in now.items()})
        return make_boxed_func(graph.forward)

    def traced(graph, inputs, inner_compile=uncompiled_inner, **options):
        return compile_fx(graph, inputs, inner_compile=inner_compile, **options)

    now = {name: partial(attrgetter(name), inductor) for name in compiled_forward.INDUCTOR_OPTIONS}
    theirs = {name: not value for name, value in compiled_forward.INDUCTOR_OPTIONS.items()}
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", traced)
    with inductor.patch(theirs):
        prove(
            unhooked_model,
            round_,
            range(8),
            engine=HFEngine(unhooked_model, batch_size=8, seq_len=16, compiled=True),
        )
    assert seen
    assert all(settings == compiled_forward.INDUCTOR_OPTIONS for settings in seen)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what the deterministic mode changes in this process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what comes after is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    products = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    before = {name: getattr(products, name) for name in names}
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    for name, value in before.items():
        setattr(products, name, value)


def test_the_deterministic_mode_is_the_process_s_and_named(unhooked_model, round_: Round, restored):
    plain = prove(unhooked_model, round_, range(9), batch_size=8)
    be_deterministic()
    proof = prove(unhooked_model, round_, range(9), batch_size=8)
    fingerprint, before = proof.header.fingerprint, plain.header.fingerprint
    assert (fingerprint.library, fingerprint.kernels) == (
        before.library,
        (*before.kernels, "deterministic"),
    )
    assert proof.distances.tolist() == plain.distances.tolist()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_every_graph_is_recorded_on_a_stream_of_its_own_of_the_device_of_its_input(
    monkeypatch: pytest.MonkeyPatch,
):
    """Torch's own choice is one stream of one device, which the graphs of several models would
    share.
    """
    streams: list[Any] = []

    def record(graph: Any, *, stream: Any, capture_error_mode: str) -> nullcontext[None]:
        assert capture_error_mode == "thread_local"
        streams.append(stream)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    for _ in range(2):
        graph = compiled_forward.RecordedGraph(lambda x: 2 * x)
        for _ in range(2):
            assert graph(torch.ones(3, device="meta")).device.type == "meta"
    one, other = streams
    assert one is not other
    assert one.device == other.device == torch.device("meta")
