import json
from dataclasses import asdict

import numpy as np
import pytest

from assay.errors import DataError, UsageError
from assay.vhack.checks import CheckSettings, check_gradients
from assay.vhack.checks.five_checks import SourceCin, check_source_log, check_unpaired, read_source_log

LINE = {"step": 0, "source": "teacher", "cin": 0.2}


def written(tmp_path, *records):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def log(n_steps, gap, seed=0):
    generator = np.random.default_rng(seed)
    return [
        SourceCin(step, source, float(np.clip(0.3 + shift + 0.05 * generator.standard_normal(), 0, 1)))
        for step in range(n_steps)
        for source, shift in (("student", 0.0), ("teacher", gap))
    ]


def test_a_log_is_read_and_other_lines_are_passed_over(tmp_path):
    entry = SourceCin(3, "student", 0.25)
    assert read_source_log(written(tmp_path, {"step": 3, "loss": 1.0}, asdict(entry), LINE)) == [
        entry,
        SourceCin(0, "teacher", 0.2),
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {**LINE, "cin": 1.5},
        {**LINE, "cin": "high"},
        {**LINE, "cin": True},
        {**LINE, "step": -1},
        {**LINE, "step": 1.0},
        {**LINE, "source": ""},
        {"source": "teacher", "cin": 0.2},
        LINE,
    ],
)
def test_a_malformed_measurement_is_refused_by_line(tmp_path, bad):
    with pytest.raises(DataError, match="line 2: "):
        read_source_log(written(tmp_path, LINE, bad))


def test_a_gap_passes_and_no_gap_fails():
    assert check_source_log(log(60, 0.1)).verdict == "pass"
    assert check_source_log(log(60, 0.0)).verdict == "fail"
    assert check_source_log(log(60, -0.1)).verdict == "fail"


def test_equal_sources_pass_at_most_as_often_as_stated():
    settings = CheckSettings(n_flips=59, n_null=19, n_resamples=60)
    passed = sum(check_source_log(log(40, 0.0, seed), settings).verdict == "pass" for seed in range(200))
    assert passed <= 20


def test_a_window_of_steps_can_be_chosen():
    early = [*log(30, 0.2), *(SourceCin(e.step + 30, e.source, e.cin) for e in log(30, -0.2, seed=1))]
    assert check_source_log(early, steps=(0, 29)).verdict == "pass"
    assert check_source_log(early, steps=(30, 59)).verdict == "fail"


def test_few_steps_are_undecided_and_absent_sources_an_error():
    assert check_source_log(log(4, 0.3)).verdict == "undecided"
    with pytest.raises(UsageError, match="no step with both teacher and student"):
        check_source_log([entry for entry in log(9, 0.1) if entry.source == "student"])


def test_a_log_takes_the_place_of_held_out_batches(gradients, quick):
    report = check_gradients(gradients(0, strength=4.0), settings=quick, log=log(60, 0.0))
    assert report["sources"].verdict == "fail"
    assert report["sources"].details["steps"] == list(range(60))


def unpaired(seed, gap, mixed):
    generator = np.random.default_rng(seed)
    groups = [f"g{i}" for i in range(12)]
    hack_groups = groups * 3 if mixed else groups[:6] * 3
    clean_groups = groups * 2 if mixed else groups[6:] * 2
    effect = dict(zip(groups, generator.standard_normal(12), strict=True))

    def scores(names, shift):
        return np.array([effect[g] + shift + generator.standard_normal() for g in names])

    settings = CheckSettings(n_flips=99, n_null=39, n_resamples=200)
    return check_unpaired(scores(hack_groups, gap), scores(clean_groups, 0.0), hack_groups, clean_groups, settings)


@pytest.mark.parametrize("mixed", [True, False], ids=["shared groups", "own groups"])
def test_two_pools_pass_with_a_gap_and_seldom_without(mixed):
    assert unpaired(0, 4.0, mixed).verdict == "pass"
    assert sum(unpaired(seed, 0.0, mixed).verdict == "pass" for seed in range(100)) <= 12
