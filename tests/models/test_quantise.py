"""Weights in eight bits: what is rounded, what is not, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from assay.errors import BackendUnavailable, CalibrationError, UsageError
from assay.models import load_model
from assay.poc import HFEngine, Round, prove, verify

HAS_TORCHAO = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('torchao')", reason="needs torchao")


def test_without_torchao_the_error_says_how_to_get_it(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(BackendUnavailable, match="eight-bit weights") as refused:
        load_model(small_checkpoint, device="cpu", quantise="int8")
    assert "torchao" in refused.value.wanted
    assert "assay[quant]" in refused.value.do


def test_unknown_formats_are_refused(small_checkpoint: Path):
    with pytest.raises(UsageError, match="quantise='int4'"):
        load_model(small_checkpoint, device="cpu", quantise="int4")


@HAS_TORCHAO
def test_float8_needs_a_device_that_has_it(small_checkpoint: Path):
    with pytest.raises(BackendUnavailable, match="float8 on cpu"):
        load_model(small_checkpoint, device="cpu", quantise="float8")


@HAS_TORCHAO
def test_int8_rounds_the_decoder_s_weights_and_nothing_else(small_checkpoint: Path):
    plain = load_model(small_checkpoint, device="cpu", dtype="float32")
    rounded = load_model(small_checkpoint, device="cpu", dtype="float32", quantise="int8")
    assert (rounded.quantised, rounded.dtype, rounded.digest) == ("int8", torch.float32, plain.digest)
    theirs = dict(rounded.module.named_parameters())
    for name, parameter in plain.module.named_parameters():
        other = theirs[name].data
        if not name.endswith("_proj.weight"):
            assert torch.equal(other, parameter), name
            continue
        step = parameter.abs().amax(dim=1, keepdim=True) / 127  # one scale for each row
        error = (other.dequantize() - parameter).abs()
        assert error.max() > 0
        assert (error <= 0.51 * step).all(), name


@HAS_TORCHAO
def test_int8_is_a_configuration_of_its_own(small_checkpoint: Path):
    round = Round(block_hash="b", public_key="k", seq_len=16)
    plain = load_model(small_checkpoint, device="cpu", dtype="float32")
    rounded = load_model(small_checkpoint, device="cpu", dtype="float32", quantise="int8")
    engine = HFEngine(rounded, batch_size=8, seq_len=16)
    proof = prove(rounded, round, range(64), engine=engine)
    assert proof.header.fingerprint.dtype == "int8"
    assert any(kernel.startswith("torchao ") for kernel in proof.header.fingerprint.kernels)
    shifted = prove(rounded, round, range(5, 13), engine=engine)
    assert shifted.distances.tolist() == proof.distances[5:13].tolist()
    # Between formats there is no stated noise: nothing is accused, and nothing passes, by accident.
    with pytest.raises(CalibrationError, match="no default noise between int8 and float32"):
        verify(proof, plain)
    with pytest.raises(CalibrationError, match="no default noise between int8 and int8"):
        verify(proof, rounded)
    claimed = replace(
        proof, header=replace(proof.header, fingerprint=HFEngine(plain, batch_size=8, seq_len=16).fingerprint)
    )
    assert verify(claimed, plain, seed=1).verdict == "fraud"
