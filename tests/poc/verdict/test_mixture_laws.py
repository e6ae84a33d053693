"""A law of distances of a mixture of experts has a heavy tail, and the command says when it rests on few distances."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.models import Model, load_model, model_info
from assay.poc import Calibration, Round, calibrate, prove
from tests.models.storing import make_mixture


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_the_experts_of_a_model_are_counted(kind: str, tmp_path: Path, small_model: Model) -> None:
    path = make_mixture(kind, tmp_path / kind, head_dim=64)
    assert load_model(path, device="cpu").experts == model_info(path).experts == 8
    assert small_model.experts == model_info("reference:qwen3").experts == 0


@pytest.mark.parametrize(("count", "mixture", "dof"), [(64, None, 2.5), (1024, False, 6), (1024, True, 2.5)])
def test_distances_of_few_nonces_or_of_a_mixture_give_no_light_tail(small_model, tmp_path, count, mixture, dof) -> None:
    """Nonces that ask other experts are few: a block without one looks as if it had a light tail."""
    round = Round(block_hash="block", public_key="key", model="small", seq_len=8)
    proof = prove(small_model, round, range(count), batch_size=64)
    noise = np.random.default_rng(0).normal(size=count) * 1e-4
    moved = [replace(record, distance=record.distance + x) for record, x in zip(proof.records, noise, strict=True)]
    made = calibrate(proof, replace(proof, records=tuple(moved)), mixture=mixture)
    made.save(tmp_path / "law.json")
    (build,) = Calibration.load(tmp_path / "law.json").builds
    assert (build.law.dof, bool(build.mixture)) == (dof, bool(mixture))
