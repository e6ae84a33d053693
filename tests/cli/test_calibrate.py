"""``assay poc calibrate``: the forms of the command, and the r_target of a valid rate over
blocks.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from assay.cli import run
from assay.errors import CalibrationError
from assay.models import load_model
from assay.models.frame import Frame
from assay.poc import (
    Calibration,
    NetworkPins,
    Pins,
    Proof,
    Round,
    calibrate,
    cheats,
    prove,
    verify,
)
from assay.stats import valid_rate
from tests.cli.conftest import made
from tests.settings_files import with_file
from tests.wordings import refuses


@pytest.fixture(scope="module")
def proofs(tmp_path_factory, small_model):
    """Proofs of one round in two batch sizes."""
    folder = tmp_path_factory.mktemp("proofs")
    round = Round(block_hash="block", public_key="key", model="small", seq_len=8)
    paths = [folder / name for name in ("a.jsonl", "b.jsonl")]
    for path, size in zip(paths, (8, 16), strict=True):
        prove(small_model, round, range(32), batch_size=size, output=path)
    return paths


FORMS = {
    "--vectors": ("--valid-rate", 0.1, "--vectors", "x"),
    "--merge": ("--valid-rate", 0.1, "--merge", "x"),
    "--dimension": ("PROOFS", "--dimension", 12, "-o", "c.json"),
    "--calibration": ("PROOFS", "--calibration", "c.json", "-o", "d.json"),
    "--pins": ("PROOFS", "--pins", "pins.toml", "-o", "c.json"),
    "--device": ("PROOFS", "--device", "cpu", "-o", "c.json"),
    "--frame": ("PROOFS", "--frame", "frame.safetensors", "-o", "c.json"),
    "--controls": ("--valid-rate", 0.1, "--controls", "float16"),
    "controls in float16, for no machine": ("PROOFS", "--controls", "float16", "-o", "c.json"),
    "--dtype": ("--valid-rate", 0.1, "--formats", "float32"),
    "--quick": ("PROOFS", "--quick", "-o", "c.json"),
    "`alpha`": ("--valid-rate", 0.1, "--set", "alpha=0.5"),
    "`checked`": ("PROOFS", "--set", "checked=7", "-o", "c.json"),
    "--digest": ("PROOFS", "--digest", "ab" * 32, "-o", "c.json"),
    "--sets": ("PROOFS", "--sets", "x", "-o", "c.json"),
    "-o": ("PROOFS",),
    "leave `vectors`": ("PROOFS", "--vectors", "SETS", "-o", "c.json"),
    "directory": ("--vectors", "none", "-o", "no-such-folder/c.json"),
    "repeat --merge": ("--merge", "c.json", "-o", "d.json"),
    "measurement without -o": ("--model", "reference:qwen3"),
    "two honest proofs": ("PROOF", "-o", "c.json"),
}


@pytest.mark.parametrize("words", FORMS)
def test_forms_that_do_not_go_together_are_refused_by_name(words, refused, proofs, tmp_path):
    known = {"PROOFS": proofs, "PROOF": proofs[:1], "SETS": ["x"]}
    arguments = [value for word in FORMS[words] for value in known.get(str(word), [word])]
    assert words in " ".join(refused("poc", "calibrate", *arguments).split())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def blocks(told, proving, tmp_path):
    """Proofs of two blocks of the small checkpoint, 32 nonces each."""
    return [
        told(*proving(f"{name}.jsonl", block_hash=name, nonces="0:32"))["path"]
        for name in ("one", "two")
    ]


def test_proofs_of_several_blocks(told, refused, blocks, small_checkpoint, tmp_path):
    both = ("poc", "calibrate", "--valid-rate", 0.2, *blocks)
    assert "no effective dimension" in refused(*both)
    measured = told(*both, "--model", small_checkpoint, "--device", "cpu")
    assert (measured["n"], measured["blocks"]) == (64, 2)
    assert measured["effective_dimension"] == pytest.approx(
        64, rel=0.35
    )  # random weights use nearly all coordinates
    for wrong in (
        (blocks[0],),
        ("-o", tmp_path / "x"),
        ("--dimension", 5),
        ("--model", "reference:llama", "--device", "cpu"),
        ("--model", small_checkpoint, "--calibration", "c.json"),
    ):
        refused(*both, *wrong)


@pytest.fixture(scope="module")
def measured(small_checkpoint, tmp_path_factory):
    """Calibration and pins of the small checkpoint, by this machine alone, in two formats."""
    folder = tmp_path_factory.mktemp("measured")
    calibration = folder / "calibration.json"
    pins = folder / "pins.toml"
    beside = folder / "calibration.json.part"
    beside.mkdir()
    (beside / "notes.json").touch()
    shape = ("--seq-len", "16", "--blocks", "8", "--nonces", "32", "--formats", "bfloat16,float32")
    alone = ("poc", "calibrate", "--model", small_checkpoint, "--device", "cpu", *shape)
    assert run(with_file(*alone, "-o", calibration, "--pins", pins, folder=folder)) == 0
    return calibration, pins


@pytest.mark.slow
def test_one_machine_measures_a_law_for_every_pair_of_formats(
    measured, small_model, small_checkpoint
):
    calibration, pins = measured
    builds = Calibration.load(calibration).builds
    assert [build.formats[0] for build in builds] == [
        ["bfloat16", "bfloat16"],
        ["bfloat16", "float32"],
        ["float32", "float32"],
    ]
    assert builds[2].law.size < builds[1].law.size / 10, (
        "float32 is not judged by the noise of bfloat16"
    )
    assert {build.n for build in builds} == {256}
    assert all(build.left_out is None or build.left_out.worst < 0.1 for build in builds), (
        "engines alike were two"
    )
    assert builds[1].scores, "which price the bets"
    assert NetworkPins.load(pins).models[0].builds[0].dtype == ("bfloat16",)

    coarse = load_model(small_checkpoint, dtype="bfloat16", device="cpu")
    round = Round(block_hash="another", public_key="k", seq_len=16)
    known = Calibration.load(calibration)
    honest = prove(coarse, round, range(192), batch_size=16)
    verdict = verify(
        honest,
        small_model,
        sample=192,
        expect=replace(Pins.of(round), prover_dtype="bfloat16"),
        calibration=known,
    )
    assert (verdict.verdict, verdict.exit_code) == ("honest", 0), verdict.reason
    assert (verdict.work, 0 < verdict.power < 1) == (1.0, True)
    cheat = prove(cheats.rounded(coarse, 2), round, range(96), batch_size=16)
    assert verify(cheat, small_model, expect=round, calibration=known).fraud
    half = load_model(small_checkpoint, dtype="float16", device="cpu")
    with refuses(CalibrationError, "one machine measures a law for every pair of formats"):
        verify(prove(half, round, range(96)), small_model, calibration=known)


@pytest.mark.slow
def test_a_control_needs_a_calibration_that_measured_one(
    refused, measured, small_model, small_checkpoint, tmp_path
):
    path = tmp_path / "proof.jsonl"
    prove(
        small_model,
        Round(block_hash="b", public_key="k", seq_len=16),
        range(64),
        batch_size=16,
        output=path,
    )
    known = (
        "--model",
        small_checkpoint,
        "--device",
        "cpu",
        "--block-hash",
        "b",
        "--public-key",
        "k",
    )
    assert "`control` without a calibration" in refused("poc", "verify", path, *known, "--control")
    beside = ("--control", "--calibration", measured[0])
    assert "a calibration without a control" in refused("poc", "verify", path, *known, *beside)


@pytest.mark.slow
def test_one_command_gives_law_frame_and_pins_of_tokens(assay, small_checkpoint, tmp_path):
    law, pins, frame = (
        tmp_path / name for name in ("law.json", "pins.toml", "law.frame.safetensors")
    )
    shape = (
        "--seq-len",
        16,
        "--blocks",
        8,
        "--nonces",
        32,
        "--formats",
        "bfloat16,float32",
        "--device",
        "cpu",
    )
    command = (
        "poc",
        "calibrate",
        "--model",
        small_checkpoint,
        "--preset",
        "tokens-1",
        *shape,
        "-o",
        law,
    )
    assert assay(*command, "--pins", pins).code == 0
    made = frame.read_bytes()
    assert Frame.load(frame).digest == NetworkPins.load(pins).models[0].digest

    known = ("--pins", pins, "--block-hash", "another", "--public-key", "k", "--device", "cpu")
    proof = tmp_path / "p.jsonl"
    judge = ("--model", small_checkpoint, "--dtype", "float32", *known)
    assert assay("poc", "prove", *known, "--nonces", "0:192", "-o", proof).code == 0
    honest = assay("poc", "verify", proof, *judge, "--sample", 192)
    assert (honest.code, "192 of 192 nonces, 100% of the node's work" in honest.out) == (0, True), (
        honest.out
    )
    coarse = cheats.rounded(
        load_model(small_checkpoint, dtype="bfloat16", device="cpu").with_frame(frame), 4
    )
    prove(
        coarse, Proof.load(proof).round, range(64), batch_size=32, output=tmp_path / "cheat.jsonl"
    )
    assert assay("poc", "verify", tmp_path / "cheat.jsonl", *judge).code == 1

    assert (assay(*command).code, frame.read_bytes()) == (0, made), (
        "the frame that is there is taken"
    )


def test_files_of_a_user_in_the_folder_of_a_measurement_stay(measured):
    folder = measured[0].with_name("calibration.json.part")
    assert [path.name for path in folder.iterdir()] == ["notes.json"]


def test_the_interval_of_a_rate_needs_a_measured_model(told, refused, measured):
    rate = ("poc", "calibrate", "--valid-rate", 0.1)
    assert "block_rate_low" not in told(*rate)
    found = told(*rate, "--calibration", measured[0])
    assert found["effective_dimension"] == pytest.approx(
        64, rel=0.35
    )  # random weights use nearly all coordinates
    assert 0.05 < found["block_rate_low"] < 0.1 < found["block_rate_high"] < 0.15
    assert "block_rate_low" not in told(*rate, "--dimension", 12)
    refused(*rate, "--model", "reference:llama", "--calibration", measured[0])


def test_a_calibration_of_another_model_says_nothing_of_the_blocks_of_proofs(
    told, refused, measured, small_model, tmp_path
):
    proof = made(small_model)
    proof.save(tmp_path / "own.jsonl")
    header = replace(proof.header, digest="0" * 64)
    Proof.build(header, proof.records, 1.0).save(tmp_path / "other.jsonl")
    rate = ("poc", "calibrate", "--valid-rate", 0.5, "--calibration", measured[0])
    own = told(*rate, tmp_path / "own.jsonl")
    assert own["n"] == 32
    assert "of 0 checkpoints of these proofs" in refused(*rate, tmp_path / "other.jsonl")
    builds = Calibration.load(measured[0]).builds
    merged = tmp_path / "merged.json"
    Calibration(builds=(*(replace(build, digest="0" * 64) for build in builds), *builds)).save(
        merged
    )
    rate = (*rate[:-1], merged)
    assert "of 2 checkpoints" in refused(*rate)
    assert told(*rate, tmp_path / "own.jsonl") == own


def test_the_table_of_a_rate_has_an_r_target_of_that_rate(assay):
    """Rounded to 1.4 it is that of a third as many nonces."""
    shown = assay("poc", "calibrate", "--valid-rate", 0.1).out
    target = float(re.search(r"r target +(\S+)", shown)[1])
    assert valid_rate(target, 8192) == pytest.approx(0.1, rel=1e-2)


def test_too_few_nonces_are_refused_before_a_model_is_loaded(refused, tmp_path):
    few = ("--blocks", 2, "--nonces", 64)
    assert "at least 256" in refused(
        "poc", "calibrate", "--model", "reference:qwen3", *few, "-o", tmp_path / "c.json"
    )


def test_a_chain_gets_parameters_with_their_costs(
    assay, refused, told, small_model, tmp_path, monkeypatch
):
    """The JSON has the names of the chain, and the last line of the table can be pasted."""
    measured = [
        made(small_model, range(64), preset="artifact", block_hash=f"c{number}")
        for number in range(2)
    ]
    rng = np.random.default_rng(0)
    moved = [
        Proof.build(
            replace(proof.header, fingerprint=replace(proof.header.fingerprint, batch_size=16)),
            [
                replace(
                    record,
                    vector=(record.vector + rng.normal(0, 0.01, 12)).astype(np.float16),
                )
                for record in proof.records
            ],
            1.0,
        )
        for proof in measured
    ]
    law = tmp_path / "law.json"
    calibrate(*measured, *moved).save(law)
    words = ("poc", "calibrate", "--export", "gonka", "--calibration", law)
    document = told(*words)
    assert document["schema"] == "assay.poc.export/1"
    names = {"dist_threshold", "p_mismatch", "p_value_threshold"}
    assert document["stat_test"].keys() == names
    assert {cost["rule"] for cost in document["costs"]} >= {"measured"}
    assert all(0 <= cost["low"] <= cost["high"] <= 1 for cost in document["costs"])
    monkeypatch.setenv("ASSAY_DEVICE", "cpu")  # a variable is for all commands
    shown = assay(*words)
    assert json.loads(shown.out.splitlines()[-1]) == document["stat_test"]
    assert "--model" in refused(*words, "--model", "reference:qwen3")
    assert "--calibration" in refused(*words[:4])


def test_a_pins_file_that_exists_is_refused_before_anything_is_measured(
    assay, small_checkpoint, tmp_path, monkeypatch
):
    """Its operator may have written nodes and rates into it."""
    monkeypatch.setattr(
        "assay.poc.one_machine.calibrate_model", lambda *_, **__: pytest.fail("it was measured")
    )
    pins = tmp_path / "pins.toml"
    pins.write_text("# my own nodes\n")
    law = tmp_path / "law.json"
    refused = assay(
        "poc", "calibrate", "--model", small_checkpoint, "--quick", "-o", law, "--pins", pins
    )
    assert refused.code == 2
    assert "--pins" in refused.err
    assert pins.read_text() == "# my own nodes\n"
    assert not law.exists()
