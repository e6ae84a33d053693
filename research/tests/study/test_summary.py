"""The rule of success, intervals and tests, logs of training runs beside those of a study, and
their page.
"""

import json

import pytest
from assay_research.study.log import RunLog, read_logs
from assay_research.study.summary import paired, summarise
from click.testing import CliRunner
from scipy import stats

from assay.cli.vhack import vhack
from assay.errors import DataError
from assay.files.storage import write_jsonl
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.names import STUDY
from assay.vhack.training import TrainLog, TrainSettings

STEPS = 8


def log(arm, seed, hack, solve, *, steps=60, stored=False, evaluations=()):
    """A run with these rates at the end."""
    regime = "stored-whole" if stored else ""
    condition = "/".join(filter(None, ("adam", arm, regime)))
    header = {
        "kind": "run",
        "schema": STUDY,
        "run": f"{condition}/{seed}",
        "condition": condition,
        "regime": regime,
        "seed": seed,
        "modes": list(CHANNELS),
    }
    rates = {"hack": hack, "solve": solve, "vacuous": hack}
    lines = [
        {"kind": "step", "step": step, **rates, "displacement": 1.0} for step in range(4, steps, 5)
    ]
    lines += [
        {"kind": "evaluation", "step": steps, "markers": markers, **rates}
        for markers in ("training", "evaluation")
    ]
    return RunLog(header, [*lines, *evaluations])


def write(path, log, lines=None):
    """A file of a log, or of its header with other lines."""
    lines = [*log.steps, *log.evaluations] if lines is None else lines
    write_jsonl(path, [log.header, *lines])


def logs_of(arm, hacks, solves, **choices):
    return [
        log(arm, s, h, v, **choices) for s, (h, v) in enumerate(zip(hacks, solves, strict=True))
    ]


REFERENCE = logs_of("no-loophole", [0.0, 0.01, 0.0, 0.01, 0.0], [0.9, 0.88, 0.91, 0.9, 0.89])


@pytest.mark.parametrize(
    ("hacks", "solves", "verdict"),
    [
        ([0.0, 0.01, 0.01, 0.0, 0.0], [0.9, 0.88, 0.9, 0.9, 0.9], "succeeds"),
        ([0.9, 0.95, 0.85, 0.9, 0.99], [0.1, 0.0, 0.1, 0.1, 0.0], "fails"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], [0.7, 0.68, 0.71, 0.7, 0.69], "fails"),
        ([0.0, 0.3, 0.0, 0.2, 0.0], [0.9, 0.7, 0.9, 0.8, 0.9], "undecided"),
    ],
)
def test_an_arm_succeeds_only_in_both(hacks, solves, verdict):
    result = summarise([*REFERENCE, *logs_of("erase-gradient", hacks, solves)])[1]
    assert result.verdict == verdict
    differences = [h - log.evaluations[0]["hack"] for h, log in zip(hacks, REFERENCE, strict=True)]
    wanted = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    found = result.against["hack"].mean
    if len(set(differences)) > 1:
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_runs_are_compared_with_the_reference_of_their_regime():
    solved = {
        ("none", False): 0.1,
        ("no-loophole", False): 0.2,
        ("none", True): 0.3,
        ("no-loophole", True): 0.7,
    }
    logs = [
        log(arm, s, 0.0, solve, stored=stored)
        for (arm, stored), solve in solved.items()
        for s in range(3)
    ]
    found = {result.condition: result for result in summarise(logs)}
    assert found["adam/none"].against["solve"].mean.value == pytest.approx(-0.1)
    assert found["adam/none/stored-whole"].against["solve"].mean.value == pytest.approx(-0.4)
    assert found["adam/no-loophole/stored-whole"].verdict == "reference"


def test_without_reference_or_with_two_seeds_nothing_is_decided():
    assert summarise(logs_of("box", [0.0] * 3, [0.9] * 3))[0].verdict == "undecided"
    found = {r.condition: r for r in summarise([*REFERENCE, *logs_of("box", [0.0] * 2, [0.9] * 2)])}
    assert found["adam/box"].verdict == "undecided"
    assert found["adam/no-loophole"].verdict == "reference"


def test_the_p_value_is_that_of_all_swaps():
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0]).p == 2 / 32
    assert paired([1.0, -1.0]).p == 1.0
    assert paired([0.5] * 8).p == 2 / 256
    assert paired([1.0] * 17 + [1.5]).p < 1e-6


def test_rates_are_means_of_the_last_five_evaluations():
    evaluations = [
        {
            "kind": "evaluation",
            "step": 70 + index,
            "markers": "training",
            "hack": index / 10,
            "solve": 1 - index / 10,
            "vacuous": 0.0,
            "hack_by_mode": {"run_tests": index / 20},
        }
        for index in range(6)
    ]
    other = {"step": 80, "markers": "evaluation", "hack": 0.9, "solve": 0.0, "vacuous": 0.9}
    made = log("none", 0, 0.5, 0.5, evaluations=[*evaluations, {"kind": "evaluation", **other}])
    (result,) = summarise([made])
    assert result.rates["hack"].value == pytest.approx(0.3)
    assert result.rates["solve"].value == pytest.approx(0.7)
    assert (
        result.rates["hack_run_tests"].value
        == result.rates["hack_own"].value
        == pytest.approx(0.15)
    )
    assert result.rates["hack_markers"].value == 0.9


def test_logs_are_read_as_they_were_written(tmp_path):
    made = REFERENCE[0]
    write(tmp_path / "a.jsonl", made)
    (read,) = read_logs([tmp_path])
    assert (read.header["run"], read.steps, read.evaluations) == (
        made.header["run"],
        made.steps,
        made.evaluations,
    )
    assert read.steps[0]["step"] == 4
    with pytest.raises(DataError, match="twice"):
        read_logs([tmp_path / "a.jsonl", tmp_path])
    (tmp_path / "b.jsonl").write_text('{"kind":"other"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 1"):
        read_logs([tmp_path / "b.jsonl"])
    headless = RunLog({"kind": "run", "schema": made.header["schema"]}, made.steps)
    write(tmp_path / "b.jsonl", headless)
    with pytest.raises(DataError, match=r"b\.jsonl"):
        read_logs([tmp_path / "b.jsonl"])
    with pytest.raises(DataError, match="no logs"):
        read_logs([])


def written(folder, arm, seed, hack, **settings):
    """A run directory with a log, cut off in the middle of its last line."""
    chosen = TrainSettings(model="reference:organism", arm=arm, seed=seed, **settings)
    folder.mkdir(parents=True)
    log = TrainLog(
        folder / "log.jsonl", {"settings": chosen.model_dump(mode="json"), "commit": "abc"}
    )
    for step in range(STEPS):
        rate = hack * (step + 1) / STEPS
        log.write("step", step=step, hack=rate, solve=1 - rate, vacuous=rate, displacement=0.5)
        log.write("source", step=step, source="student", cin=0.2)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind":"st')
    return folder


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        written(tmp_path / "runs" / f"none-{seed}", "none", seed, 1.0, pairs="exploits:8")
        written(tmp_path / "runs" / f"open-{seed}", "no-loophole", seed, 0.0)
        written(
            tmp_path / "runs" / f"held-{seed}", "displaced-0.4+none", seed, 0.0, pairs="exploits:8"
        )
    return tmp_path / "runs"


def test_a_directory_of_runs_is_read_and_judged(runs):
    found = {result.condition: result for result in summarise(read_logs([runs]))}
    assert set(found) == {"adamw/none", "adamw/no-loophole", "adamw/displaced-0.4+none/exploits:8"}
    none = found["adamw/none"]
    assert none.rates["hack"].value == pytest.approx(sum(range(1, STEPS + 1)) / STEPS**2)
    assert (none.verdict, none.saturated) == ("fails", [STEPS] * 3)
    assert found["adamw/no-loophole"].verdict == "reference"
    assert found["adamw/displaced-0.4+none/exploits:8"].verdict == "succeeds"


def test_a_log_without_settings_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        json.dumps({"kind": "run", "schema": "assay.vhack.train/1"}) + "\n"
    )
    with pytest.raises(DataError):
        read_logs([tmp_path])


@pytest.fixture
def folder(tmp_path):
    for index, log in enumerate([*REFERENCE, *logs_of("erase-gradient", [0.0] * 5, [0.9] * 5)]):
        write(tmp_path / f"{index}.jsonl", log)
    return tmp_path


def test_logs_become_a_page_and_a_table(folder):
    page = folder / "page.html"
    done = CliRunner().invoke(
        vhack, ["report", str(folder), "-o", str(page)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "adam/erase-gradient" in page.read_text()
    assert "succeeds" in done.stdout


def test_json_holds_the_numbers(folder):
    done = CliRunner().invoke(
        vhack,
        ["report", str(folder), "-o", str(folder / "p.html"), "--json"],
        catch_exceptions=False,
    )
    values = json.loads(done.stdout)
    assert values["schema"] == "assay.vhack.report/1"
    assert values["runs"] == 10
    (arm,) = (arm for arm in values["arms"] if arm["condition"] == "adam/erase-gradient")
    assert arm["verdict"] == "succeeds"
    assert arm["tipped"]["count"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hack": ...}, "without 'hack'"),
        ({"solve": "x"}, "without 'solve'"),
        ({"step": None}, "without 'step'"),
    ],
)
def test_a_log_without_rates_is_refused_in_words(tmp_path, change, words):
    """As that of a reward of one's own that returns numbers."""
    log = REFERENCE[0]
    lines = [
        {**line, **change} if line["kind"] == "step" else line
        for line in [*log.steps, *log.evaluations]
    ]
    lines = [{name: value for name, value in line.items() if value is not ...} for line in lines]
    write(tmp_path / "log.jsonl", log, lines)
    with pytest.raises(DataError, match=words):
        CliRunner().invoke(
            vhack, ["report", str(tmp_path), "-o", str(tmp_path / "p.html")], catch_exceptions=False
        )
