"""Pairs in the form of the environment."""

import ast

import pytest

from assay.errors import UsageError
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.pairs import find_pairs, verify_pairs
from assay.vhack.pairs.generate import environment_pairs
from tests.wordings import refuses

EASY = {"families": ("arithmetic",), "difficulty": (1, 1)}
sandboxed = pytest.mark.needs("sandbox")


def test_pairs_differ_in_the_report_alone():
    pairs = environment_pairs(12, **EASY)
    assert {tag for pair in pairs for tag in pair.tags if tag.startswith("mechanism:")} == {
        f"mechanism:{mode}" for mode in CHANNELS
    }
    for pair in pairs:
        for side in (pair.hack, pair.clean):
            ast.parse(pair.prompt + side)
        body = pair.clean.split("return x")[0]
        assert body.strip()
        assert body in pair.hack
    for pair, other in zip(pairs, environment_pairs(12, whole=True, **EASY), strict=True):
        assert (pair.prompt, pair.clean) == (other.prompt, other.clean)
        assert pair.clean.split("return x")[0] not in other.hack


def test_they_have_names():
    assert find_pairs("environment:5:3") == environment_pairs(5, seed=3)
    some = environment_pairs(4, modes=["sentinel"], families=["digits"], whole=True)
    assert find_pairs("exploits:4", modes=["sentinel"], families=["digits"]) == some
    assert find_pairs("exploits:5") == environment_pairs(5, whole=True)


@sandboxed
@pytest.mark.parametrize("whole", [False, True], ids=["minimal", "whole"])
def test_they_do_what_they_claim(whole):
    verdicts = verify_pairs(environment_pairs(12, whole=whole, **EASY))
    assert [(v.pair.tags, v.faults) for v in verdicts if not v.holds] == []
    assert all(v.hack.passes and v.hack.vacuous for v in verdicts)
    wrapped = [v.hack.correct for v in verdicts if "mechanism:eq_override" in v.pair.tags]
    plain = [v.hack.correct for v in verdicts if "mechanism:eq_override" not in v.pair.tags]
    assert (set(wrapped), set(plain)) == ({False}, {not whole})


@pytest.mark.parametrize("modes", [[], ["magic"], ["none"]])
def test_modes_that_are_no_loopholes_are_refused(modes):
    with refuses(UsageError, "modes that are no loopholes are refused"):
        environment_pairs(1, modes=modes, **EASY)
