"""A law of one machine: the quick one, its estimate, and what an interrupted measurement keeps."""

import pytest

from assay.errors import CalibrationError, DataError
from assay.models import load_model
from assay.poc import Calibration, Round, calibrate_model, cheats, prove, verify
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.launch import usual_preset
from assay.poc.one_machine import Extent, say_time
from tests.wordings import refuses

SHAPE = {"seq_len": 16, "blocks": 8, "nonces": 32, "device": "cpu"}


class _Stop(Exception):
    """Stands for a signal."""


@pytest.fixture
def computed(monkeypatch):
    """The nonces that engines compute, one number a batch."""
    counts = []
    real = HFEngine.run

    def run(engine, inputs, *arguments):
        counts.append(len(inputs))
        return real(engine, inputs, *arguments)

    monkeypatch.setattr(HFEngine, "run", run)
    return counts


@pytest.mark.slow
def test_an_interrupted_measurement_continues_and_gives_the_same_law(
    small_checkpoint, tmp_path, computed
):
    how = {**SHAPE, "formats": ("bfloat16", "float32")}
    undisturbed = calibrate_model(str(small_checkpoint), **how)
    total = sum(computed)

    def stop(done, _):
        if done >= 1000:
            raise _Stop

    computed.clear()
    partial = tmp_path / "law.json.part"
    with pytest.raises(_Stop):
        calibrate_model(str(small_checkpoint), **how, partial=partial, progress=stop)
    torn = next(partial.glob("*.partial"))
    torn.write_bytes(torn.read_bytes()[:-9])
    computed.clear()
    continued = calibrate_model(str(small_checkpoint), **how, partial=partial)
    assert sum(computed) <= total - 1000 + 64, "what was kept is measured again"
    assert continued == undisturbed


@pytest.mark.slow
def test_what_was_kept_of_another_measurement_is_not_taken(small_checkpoint, tmp_path, computed):
    how = {**SHAPE, "formats": ("float32",), "partial": tmp_path / "part"}
    calibrate_model(str(small_checkpoint), **how)
    first = sum(computed)
    computed.clear()
    calibrate_model(str(small_checkpoint), **how | {"seq_len": 8})
    assert sum(computed) == first
    for damaged in ("{}", '{"values":null}', '{"values":["nan"]}', '{"values":[1.0,2.0]}'):
        for kept in how["partial"].glob("*.json"):
            kept.write_text(damaged)
        with refuses(DataError, "what was kept of another measurement is not taken"):
            calibrate_model(str(small_checkpoint), **how)


@pytest.mark.slow
@pytest.mark.no_law
def test_a_quick_law_decides_in_its_own_format_and_accuses_no_other(small_checkpoint, tmp_path):
    said = []
    calibrate_model(str(small_checkpoint), quick=True, device="cpu", announce=said.append).save(
        tmp_path / "law.json"
    )
    law = Calibration.load(tmp_path / "law.json")
    assert len(said) == 1
    assert "768 nonces of 16 positions" in said[0]
    (build,) = law.builds
    assert (build.n, build.formats[0]) == (256, ["float32", "float32"])
    assert "int4" in build.limits
    assert build.source.startswith("quick calibration")

    round = Round(block_hash="another", public_key="k", seq_len=16)
    model = load_model(small_checkpoint, dtype="float32", device="cpu")
    honest = prove(model, round, range(128), batch_size=16)
    assert verify(honest, model, expect=round, calibration=law).verdict == "honest"
    cheat = prove(cheats.rounded(model), round, range(64), batch_size=16)
    assert verify(cheat, model, expect=round, calibration=law).fraud
    coarse = load_model(small_checkpoint, dtype="bfloat16", device="cpu")
    other = prove(coarse, round, range(64), batch_size=16)
    for judge in (model, coarse):
        with refuses(
            CalibrationError, "a quick law decides in its own format and accuses no other"
        ):
            verify(other, judge, expect=round, calibration=law)


def test_the_full_measurement_is_larger_and_values_that_are_given_stand(small_checkpoint):
    full = Extent.of(str(small_checkpoint))
    quick = Extent.of(str(small_checkpoint), quick=True, seq_len=64)
    assert (full.total, quick.total, quick.seq_len) == (9216, 768, 64)
    assert not full.limits


@pytest.mark.parametrize(
    ("files", "preset"),
    [((), "poc-2.0"), (("tokenizer.json",), "tokens-1"), (("a.gguf",), "tokens-1")],
)
def test_a_model_with_a_tokenizer_takes_tokens(files, preset, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    assert usual_preset(str(tmp_path)) == preset


@pytest.mark.parametrize(
    ("reference", "preset"),
    [("reference:qwen3", "poc-2.0"), ("pretrained:smollm2", "tokens-1"), ("a/model", "tokens-1")],
)
def test_models_of_assay_keep_the_published_preset(reference, preset):
    assert usual_preset(reference) == preset


def test_a_duration_is_said_in_hours_and_minutes():
    assert [say_time(one) for one in (0.2, 59, 90, 10920)] == ["1 s", "59 s", "2 min", "3 h 2 min"]
