"""A run that the first version began goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from assay.cli import run as cli
from assay.cli import vhack as _cli
from assay.errors import AssayError, DataError, ModelError, StorageError, UsageError
from assay.files.storage import one_writer
from assay.vhack import Basis
from assay.vhack.detectors import fit_judge
from assay.vhack.directions.basis import extract as _extract
from assay.vhack.directions.delta import ARMS
from assay.vhack.directions.delta import adapter as _delta
from assay.vhack.training import TrainLog, train
from assay.vhack.training import prepared as _prepared
from assay.vhack.training import run as _run
from assay.vhack.training.log import read_records, read_steps
from assay.vhack.training.outcomes import Outcomes
from assay.vhack.training.prepared import PreparedRun
from tests.usual import usual
from tests.wordings import refuses

pytestmark = pytest.mark.usefixtures("undrawn")


def lines(folder):
    """The log without what a clock has put there."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in found
    ]


@pytest.fixture
def run(tasks, pairs, settings, tmp_path):
    """A run in a directory below the test's, with a model loaded anew."""

    def call(name, **others):
        return train(settings(**others), tmp_path / name, tasks=tasks, pairs=pairs)

    return call


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_going_on_from_a_checkpoint_is_the_same_run_bit_by_bit(run, tmp_path):
    """Also with axes that were renewed before the checkpoint and are again after it."""
    common = {"refresh": 1, "arm": "erase-update:shuffled", "save_every": 2}
    straight = run("straight", steps=4, **common)
    run("stopped", steps=2, **common)
    with (tmp_path / "stopped" / "log.jsonl").open("a") as log:
        # A step that was logged after the checkpoint, and a line that was being written when the
        # machine went down.
        log.write(
            '{"kind":"step","step":2,"hack":1.0}\n{"kind":"source","step":2,"source":"student","cin"'
        )
    resumed = run("stopped", steps=4, **common)
    assert (straight.resumed_from, resumed.resumed_from) == (0, 2)
    first, second = (
        load_file(tmp_path / name / "delta.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(tensor.any() for tensor in first.values())
    states = [
        torch.load(tmp_path / name / "checkpoint-4" / "optimizer.pt", weights_only=True)
        for name in ("straight", "stopped")
    ]
    assert str(states[0]) == str(states[1])
    (_, *wanted), (_, *found) = lines(tmp_path / "straight"), lines(tmp_path / "stopped")
    assert found == wanted
    assert [record["step"] for record in found if record["kind"] == "step"] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_a_run_that_goes_on_reads_its_axes_instead_of_extracting_them(run, tmp_path, monkeypatch):
    common = {"arm": "erase-gradient", "save_every": 1}
    run("run", steps=1, **common)
    for module in (_extract, _prepared):
        monkeypatch.setattr(
            module, "pair_gradients", lambda *_, **__: pytest.fail("gradients were computed again")
        )
    assert run("run", steps=2, **common).resumed_from == 1


@pytest.mark.needs("sandbox")
def test_the_log_says_what_happened_and_the_checks_read_it(run, tmp_path):
    result = run("run", steps=3, arm="erase-gradient")
    head, steps = read_steps(tmp_path / "run" / "log.jsonl")
    assert head["settings"]["arm"] == "erase-gradient"
    assert len(steps) == result.steps == 3
    for step in steps:
        assert step["hack_teacher"] == 1.0
        assert step["rollouts"] == 4
        assert step["rollouts_teacher"] == 2
        assert step["cin_two_sided"] >= step["cin"] > 0
        assert step["cout"] < 1e-6
        assert step["reward"] == pytest.approx((2 + 4 * (step["hack"] + step["solve"])) / 6)
        assert 0 < step["cin_t"] <= 1
        assert 0 < step["cin_s"] <= 1
        assert 0 < step["ratio_teacher"] < 0.5
    lines = [one for one in read_records(tmp_path / "run" / "log.jsonl") if one["kind"] == "source"]
    assert {
        (e["step"], e["source"]): e["cin"] for e in lines if e["source"] in ("student", "teacher")
    } == {
        (step["step"], source): step[name]
        for step in steps
        for source, name in (("student", "cin_s"), ("teacher", "cin_t"))
    }
    assert result.last["cin"] == pytest.approx(sum(step["cin"] for step in steps) / 3)


@pytest.mark.needs("sandbox")
@pytest.mark.parametrize(
    "arm",
    usual(
        (*ARMS, "box", "advantage-modification", "displaced-0.4+erase-update-two-sided"),
        *("none", "filter", "absorb", "penalty", "displaced-0.4+erase-update-two-sided"),
    ),
)
def test_every_kind_of_arm_runs(run, tmp_path, arm):
    judged = {"detector": "labels"} if arm in ARMS and ARMS[arm].flagged else {}
    steps = read_steps(run(arm, arm=arm, steps=1, **judged).folder / "log.jsonl")[1]
    (step,) = steps
    wanted = {"no-loophole": 0.0, "ground-truth-penalty": -2 / 6}.get(arm, 2 / 6)
    assert step["reward"] == pytest.approx(wanted + 4 / 6 * step["solve"])
    delta = load_file(tmp_path / arm / "delta.safetensors")
    moved = any(tensor.any() for name, tensor in delta.items() if not name.startswith("_"))
    assert moved == ((arm != "no-loophole" and not judged) or step["solve"] > 0)
    if judged:
        assert (step["flagged_teacher"], step["caught_teacher"]) == (1.0, 1.0)
    assert ("quarantine" in step) == (arm in ("quarantine", "absorb"))
    if arm.startswith("displaced"):
        assert step["leak_two_sided"] < 1e-6
        assert step["displacement"] == pytest.approx(
            0.4 * 2 * 14, rel=1e-5
        )  # two axes in each of 14 modules
    if arm == "box":
        assert step["displacement_hackward"] < 1e-7


@pytest.mark.needs("sandbox")
def test_plain_training_without_a_teacher(run):
    """TRL's own generation; no reward is earned, and so nothing moves and no source has a
    direction.
    """
    result = run("run", teacher=None, arm="none", steps=1, max_new_tokens=4)
    step = read_steps(result.folder / "log.jsonl")[1][0]
    assert step["rollouts"] == 6
    assert "cin_t" not in step
    assert all(one["kind"] != "source" for one in read_records(result.folder / "log.jsonl"))


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_the_divergence_from_the_start_is_of_the_adapted_model_without_its_delta(run, tmp_path):
    """In the first step it is exactly zero; in the second it pulls back."""
    deltas = []
    for beta in (0.0, 10.0):
        run(f"beta {beta}", beta=beta, steps=2, arm="none", max_norm=0.0)
        deltas.append(load_file(tmp_path / f"beta {beta}" / "delta.safetensors"))
    first = [read_steps(tmp_path / f"beta {beta}" / "log.jsonl")[1] for beta in (0.0, 10.0)]
    assert first[0][0]["loss"] == pytest.approx(first[1][0]["loss"], abs=1e-7)
    assert first[1][1]["loss"] > first[0][1]["loss"]
    assert any(not torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


@pytest.mark.needs("sandbox")
def test_a_finished_run_is_not_trained_again_and_others_keep_out(run, tmp_path):
    run("run", steps=1)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert run("run", steps=1).steps == 1
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    with refuses(UsageError, "a finished run is not trained again and others keep out"):
        run("run", steps=1, lr=0.1)
    run("run", steps=2)
    with refuses(UsageError, "a finished run is not trained again and others keep out, 2"):
        run("run", steps=1)
    (tmp_path / "run" / "log.jsonl").unlink()
    with refuses(DataError, "a finished run is not trained again and others keep out, 3"):
        run("run", steps=3)


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_a_run_that_went_down_after_its_last_checkpoint_is_finished(run, tmp_path):
    run("run", steps=2)
    wanted = load_file(tmp_path / "run" / "delta.safetensors")
    (tmp_path / "run" / "delta.safetensors").unlink()
    before = lines(tmp_path / "run")
    assert run("run", steps=2).resumed_from == 2
    found = load_file(tmp_path / "run" / "delta.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert lines(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_an_interrupted_checkpoint_is_no_checkpoint(run, tmp_path):
    run("run", steps=4, save_every=2)
    (tmp_path / "run" / "checkpoint-4" / "complete.json").unlink()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "run" / "delta.safetensors").rename(tmp_path / "wanted.safetensors")
    wanted_lines = lines(tmp_path / "run")
    assert run("run", steps=4, save_every=2).resumed_from == 2
    assert lines(tmp_path / "run") == wanted_lines
    wanted = load_file(tmp_path / "wanted.safetensors")
    found = load_file(tmp_path / "run" / "delta.safetensors")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_a_basis_file_takes_the_place_of_the_pairs(run, tmp_path, model):
    run("first", steps=1)
    run("second", steps=1, basis=str(tmp_path / "first" / "basis.safetensors"))
    wanted, found = (
        load_file(tmp_path / name / "delta.safetensors") for name in ("first", "second")
    )
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_a_run_that_fails_takes_its_adapter_off(settings, tasks, pairs, tmp_path, model):
    """A rate that leaves numbers behind."""
    with refuses(ModelError, "a run that fails takes its adapter off"):
        train(
            settings(lr=1e30, max_norm=0.0, arm="none"),
            tmp_path / "run",
            tasks=tasks,
            pairs=pairs,
            model=model,
        )
    assert not hasattr(model.module, "delta_s")


@pytest.mark.needs("sandbox")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pairs": "nofile.jsonl"}, "nofile"),
        ({"pairs": "generated:9", "basis": "odd.safetensors"}, "odd.safetensors"),
        ({"pairs": "generated:2", "method": "lda"}, "2 pairs for lda"),
        (
            {"pairs": "generated:2", "method": "lda", "basis": "good.safetensors", "refresh": 1},
            "2 pairs for lda",
        ),
    ],
)
def test_pairs_and_basis_are_read_before_the_model_is_loaded(
    settings, tasks, tmp_path, monkeypatch, given, words
):
    monkeypatch.setattr(_run, "load_model", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    one = {"q_proj": torch.ones(1, 1)}
    Basis(one, {"q_proj": torch.ones(1)}, {"q_proj": torch.tensor([[1, 0]])}).save(
        "good.safetensors"
    )
    with pytest.raises(AssayError, match=words):
        train(settings(**given), tmp_path / "run", tasks=tasks)


def test_a_run_keeps_others_out_of_its_directory(run, tmp_path):
    with (
        one_writer(tmp_path / "run"),
        refuses(StorageError, "a run keeps others out of its directory"),
    ):
        run("run")


def test_labels_of_mechanisms_that_no_task_has_are_refused(run):
    with refuses(UsageError, "labels of mechanisms that no task has are refused"):
        run("run", arm="penalty", detector="labels=exit_code+sentinel")


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_without_it(run, tmp_path):
    run("run", steps=2, save_every=1)
    last = tmp_path / "run" / "checkpoint-2"
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "delta.safetensors"):
        whole = (last / name).read_bytes()
        for damaged in (b"", b"[]", whole[: len(whole) // 2]):
            (last / name).write_bytes(damaged)
            with refuses(DataError, "a damaged checkpoint is named and the run goes on without it"):
                run("run", steps=3, save_every=1)
        (last / name).write_bytes(whole)
    shutil.rmtree(last)
    assert run("run", steps=3, save_every=1).resumed_from == 1


def test_the_log_of_a_script_is_not_continued_as_a_run(settings, tasks, tmp_path, pairs):
    TrainLog(tmp_path / "log.jsonl", {})
    with refuses(DataError, "the log of a script is not continued as a run"):
        train(settings(), tmp_path, tasks=tasks, pairs=pairs)


@pytest.mark.parametrize("what", ["experts", "end", "pool"])
def test_what_cannot_be_trained_is_refused_before_its_weights_are_decomposed(
    settings, pairs, model, monkeypatch, tmp_path, what
):
    monkeypatch.setattr(_prepared, "weight_svd", None)
    given = {}
    if what == "experts":
        linear = model.module.model.layers[0].mlp.down_proj
        monkeypatch.setattr(
            _delta, "target_modules", lambda _: {"layers.0.experts.down_proj.7": linear}
        )
    elif what == "end":
        model.tokenizer.eos_token = model.module.generation_config.eos_token_id = (
            model.config.eos_token_id
        ) = None
    else:
        (tmp_path / "pool.jsonl").write_text("{}")
        given["teacher"] = str(tmp_path / "pool.jsonl")
    words = {"experts": "matrices of experts", "end": "a token that ends a text", "pool": "line 1"}[
        what
    ]
    with pytest.raises(AssayError, match=words):
        PreparedRun(settings(**given), model, pairs)


def test_a_model_of_which_a_part_carries_deltas_is_refused_unless_allowed(settings, pairs, model):
    """Nothing is attached to it before that is known."""
    model.module.other = torch.nn.Linear(256, 256)
    with refuses(ModelError, "a model of which a part carries deltas is refused unless allowed"):
        PreparedRun(settings(), model, pairs)
    assert not hasattr(model.module, "delta_s")
    assert PreparedRun(settings(allow_partial=True), model, pairs).adapter.model is model.module


@pytest.mark.parametrize(
    ("device", "launcher", "words"),
    [("cpu", "FSDP", "several processes with FSDP"), ("cuda:0", "", "--device cuda:0")],
)
def test_what_several_processes_cannot_do_is_refused(
    settings, tasks, pairs, tmp_path, monkeypatch, device, launcher, words
):
    """What they can is in test_several.py."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(UsageError, match=words):
        train(settings(device=device), tmp_path / "run", tasks=tasks, pairs=pairs)


@pytest.mark.needs("sandbox")
def test_a_pool_of_other_prompts_and_an_unknown_tracker_are_refused(
    settings, tasks, pairs, tmp_path
):
    from assay.vhack.environment import episodes

    with refuses(DataError, "a pool of other prompts and an unknown tracker are refused"):
        train(settings(), tmp_path / "run", tasks=episodes(4, seed=9), pairs=pairs)
    with refuses(UsageError, "a pool of other prompts and an unknown tracker are refused, 2"):
        train(settings(), tmp_path / "run", tasks=tasks, pairs=pairs, trackers=("nothing",))


FIRST = Path(__file__).parents[2] / "vectors" / "first"


@pytest.mark.slow
def test_a_checkpoint_of_the_first_version_goes_on(
    tasks, pairs, settings, checkpoint, pool, tmp_path
):
    shutil.copytree(FIRST / "training", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(
        log.read_text().replace('"MODEL"', f'"{checkpoint}"').replace('"POOL"', f'"{pool}"')
    )
    common = {"refresh": 1, "arm": "erase-update:shuffled", "save_every": 2}
    result = train(settings(steps=4, **common), tmp_path / "run", tasks=tasks, pairs=pairs)
    assert (result.resumed_from, result.steps) == (2, 4)
    now = load_file(tmp_path / "run" / "delta.safetensors")
    then = load_file(FIRST / "training_step_4.safetensors")
    assert now.keys() == then.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_a_monitor_that_does_not_know_the_exploit_gives_the_alarm_in_log_page_and_exit_code(
    run, tmp_path, monkeypatch
):
    """Also in a run that goes on, whose alarm saw the steps of before."""
    monkeypatch.setattr(Outcomes, "rates", lambda *_: {"flagged": 0.0, "missed": 0.4})
    common = {"arm": "filter", "detector": "labels=exit_code", "save_every": 2}
    assert run("run", steps=2, **common).alarm is None
    result = run("run", steps=6, **common)
    _, steps = read_steps(tmp_path / "run" / "log.jsonl")
    assert [step["alarm"] >= 1 for step in steps].index(True) == result.alarm < 5
    assert "alarm was given" in (tmp_path / "run" / "page.html").read_text()
    monkeypatch.setattr(_run, "train", lambda *_, **__: result)
    monkeypatch.setattr(_cli, "check_tokenizer", lambda _: None)
    assert cli(["vhack", "train", "--model", "m", "-o", str(tmp_path)]) == 1


@pytest.mark.slow
@pytest.mark.needs("sandbox")
@pytest.mark.parametrize(("arm", "penalties"), [("penalty", [2.0, 4.0]), ("penalty-1", [1.0, 1.0])])
def test_a_run_renews_detector_and_penalty_with_what_it_wrote(run, monkeypatch, arm, penalties):
    fitted = []
    weights = []
    refresh = PreparedRun.refresh

    def counted(pairs, *rest, **others):
        fitted.append(len(pairs))
        judge = fit_judge(pairs, *rest, **others)
        limit = replace(judge.threshold, lost=0.0, caught=0.5 ** (len(fitted) - 1))
        return replace(judge, threshold=limit)

    def watched(self, trainer, step):
        overlap = refresh(self, trainer, step)
        weights.append(-float(trainer.reward_weights[-1]))
        return overlap

    monkeypatch.setattr(_prepared, "fit_judge", counted)
    monkeypatch.setattr(PreparedRun, "refresh", watched)
    result = run("run", steps=2, arm=arm, detector="cin-svd", clean_lost=0.3, refresh=1)
    # Of each of the two prompts of a step a stored exploit and the policy's own work.
    assert fitted == [6, 8, 10]
    assert weights == penalties
    assert 0 <= result.last["flagged"] <= 1
