import numpy as np
import pytest
from assay_research.study.sources import check_source_log

from assay.errors import UsageError
from assay.vhack.directions.checks import CheckSettings


def log(n_steps, gap, seed=0, first=0):
    generator = np.random.default_rng(seed)
    return [
        {
            "step": first + step,
            "source": source,
            "cin": float(np.clip(0.3 + shift + 0.05 * generator.standard_normal(), 0, 1)),
        }
        for step in range(n_steps)
        for source, shift in (("student", 0.0), ("teacher", gap))
    ]


def test_a_gap_passes_and_no_gap_fails():
    found = check_source_log(log(60, 0.1))
    assert (found.verdict, found.details["steps"]) == ("pass", list(range(60)))
    assert "blocks of steps" in found.rule
    assert check_source_log(log(60, 0.0)).verdict == "fail"
    assert check_source_log(log(60, -0.1)).verdict == "fail"


def test_equal_sources_pass_at_most_as_often_as_stated():
    settings = CheckSettings(n_flips=59, n_null=19, n_resamples=60)
    passed = sum(
        check_source_log(log(40, 0.0, seed), settings).verdict == "pass" for seed in range(200)
    )
    assert passed <= 20


def test_a_window_of_steps_can_be_chosen():
    early = [*log(30, 0.2), *log(30, -0.2, seed=1, first=30)]
    assert check_source_log(early, steps=(0, 29)).verdict == "pass"
    assert check_source_log(early, steps=(30, 59)).verdict == "fail"


def test_few_steps_are_undecided_and_absent_sources_an_error():
    assert check_source_log(log(4, 0.3)).verdict == "undecided"
    with pytest.raises(UsageError, match="no step with both teacher and student"):
        check_source_log([line for line in log(9, 0.1) if line["source"] == "student"])
