"""A law of few distances of a mixture of experts says so, in its file and in the verdicts that it gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.models import Model, load_model, model_info
from assay.poc import Calibration, Proof, Round, calibrate, prove, verify
from assay.poc.verdict.calibration import ENOUGH_OF_MIXTURE, MIXTURE_DOF
from tests.models.storing import make_mixture

SAYS = "the law rests on 32 distances of a mixture of experts"
NONCES = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture("qwen3-moe", tmp_path_factory.mktemp("mixture") / "model", head_dim=64)


@pytest.fixture(scope="module")
def mixture(checkpoint: Path) -> Model:
    return load_model(checkpoint, device="cpu")


def proofs(model: Model, folder: Path, preset: str = "poc-2.0") -> list[Path]:
    round = Round(block_hash="block", public_key="key", model="small", preset=preset, seq_len=8)
    paths = [folder / f"{preset}-{number}.jsonl" for number in range(2)]
    for path in paths:
        prove(model, round, range(NONCES), batch_size=8, output=path)
    return paths


def measured(paths: list[Path], *, mixture: bool | None = None) -> Calibration:
    return calibrate(*map(Proof.load, paths), mixture=mixture)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_the_experts_of_a_model_are_counted(kind: str, tmp_path: Path, small_model: Model) -> None:
    path = make_mixture(kind, tmp_path / kind, head_dim=64)
    assert load_model(path, device="cpu").experts == model_info(path).experts == 8
    assert small_model.experts == model_info("reference:qwen3").experts == 0


def test_the_law_file_keeps_that_the_model_is_a_mixture(mixture: Model, tmp_path: Path) -> None:
    made = measured(proofs(mixture, tmp_path), mixture=True)
    made.save(tmp_path / "law.json")
    (build,) = Calibration.load(tmp_path / "law.json").builds
    assert build.mixture
    assert build.is_few
    assert build.noise.law.dof <= MIXTURE_DOF
    noise = build.between(None, None)
    assert SAYS in noise.caution
    assert noise.source == f"calibration on 32 nonces of a mixture, fewer than {ENOUGH_OF_MIXTURE}"
    assert noise.scaled(2.0).caution == noise.caution
    Calibration(builds=(replace(build, output="position distance"),)).save(tmp_path / "law.json")
    (several,) = Calibration.load(tmp_path / "law.json").builds
    assert SAYS in several.between(None, None).caution
    for mended in (replace(build, n=ENOUGH_OF_MIXTURE), replace(build, mixture=None)):
        assert not mended.caution()
        assert not mended.between(None, None).caution


@pytest.mark.parametrize("told", [True, None])
def test_the_verdict_says_it_and_is_the_same(mixture: Model, tmp_path: Path, told: bool | None) -> None:
    paths = proofs(mixture, tmp_path)
    doubtful, proof = measured(paths, mixture=told), Proof.load(paths[0])
    enough = Calibration(builds=tuple(replace(build, n=ENOUGH_OF_MIXTURE) for build in doubtful.builds))
    said, unsaid = (verify(proof, mixture, calibration=one, seed=1) for one in (doubtful, enough))
    of_its_tail = "; the law of a mixture of experts has a tail of 6 degrees of freedom"
    assert (of_its_tail in unsaid.reason) == (told is None)
    reason, _, _ = unsaid.reason.partition(of_its_tail)
    assert said.reason == f"{reason}; {SAYS} and may accuse an honest node: calibrate on 1024 or more"
    assert said.noise.law == unsaid.noise.law
    assert (said.verdict, said.exit_code, said.sequential) == (unsaid.verdict, unsaid.exit_code, unsaid.sequential)


@pytest.mark.parametrize(
    ("count", "mixture", "dof"), [(64, True, 2.5), (64, False, 6), (64, None, 6), (1024, True, 2.5)]
)
def test_distances_of_a_mixture_give_no_light_tail(small_model, tmp_path, count, mixture, dof) -> None:
    """Nonces that ask other experts are few: a block without one looks as if it had a light tail."""
    round = Round(block_hash="block", public_key="key", model="small", seq_len=8)
    proof = prove(small_model, round, range(count), batch_size=64)
    noise = np.random.default_rng(0).normal(size=count) * 1e-4
    moved = [replace(record, distance=record.distance + x) for record, x in zip(proof.records, noise, strict=True)]
    (build,) = calibrate(proof, replace(proof, records=tuple(moved)), mixture=mixture).builds
    assert build.noise.law.dof == dof
    light = "the law of a mixture of experts has a tail of 6 degrees of freedom and may accuse an honest node"
    said = replace(build, n=ENOUGH_OF_MIXTURE).between(None, None, mixture=True)
    assert said.caution == ("" if mixture else f"{light}: calibrate again with --model")
    assert said.source == "calibration on 1024 nonces" + ("" if mixture else " of a mixture")


def test_nothing_is_said_of_vectors_nor_of_dense_models(mixture: Model, small_model: Model, tmp_path: Path) -> None:
    for model, preset in ((mixture, "hardened"), (small_model, "poc-2.0")):
        paths = proofs(model, tmp_path, preset)
        law = measured(paths, mixture=model.experts > 0)
        verdict = verify(Proof.load(paths[0]), model, calibration=law, seed=1)
        assert "mixture" not in verdict.reason + verdict.noise.source


def test_the_command_says_it_plainly(checkpoint: Path, mixture: Model, tmp_path: Path, capsys) -> None:
    from assay.cli import run

    paths, law = proofs(mixture, tmp_path), tmp_path / "law.json"
    made = ["poc", "calibrate", *map(str, paths), "-o", str(law), "--json"]
    assert run([*made, "--model", str(checkpoint)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["warning"] == f"{SAYS} and may accuse an honest node: calibrate on 1024 or more"
    assert "advice" not in said
    judged = ["poc", "verify", str(paths[0]), "--model", str(checkpoint), "--calibration", str(law), "--json"]
    assert run([*judged, "--seed", "1"]) == 2  # the block and the key are not pinned
    assert SAYS in json.loads(capsys.readouterr().out)["reason"]
    assert run(made) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["advice"].startswith("for a mixture of experts, take 1024 nonces or more, and --model")
    assert "warning" not in said
