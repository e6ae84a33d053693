"""Pairs of many kinds of cheat: what they are made of, and that the clean sides do the task."""

import pytest
from assay_research.transfer.kinds import KINDS, PLANS, kind_pairs
from assay_research.transfer.stdin_kinds import stdin_pairs

from assay.vhack.detectors.program_source import read_program
from assay.vhack.environment.backends import available_backend
from assay.vhack.environment.sandbox import run

needs_sandbox = pytest.mark.skipif(available_backend() is None, reason="no sandbox works here")


def test_kinds_and_forms_take_turns_and_the_sides_differ():
    pairs = kind_pairs(168)
    kinds = {pair.tags[0].removeprefix("mechanism:") for pair in pairs}
    assert kinds == {*KINDS, *PLANS}
    assert len({pair.tags[1] for pair in pairs}) == 8
    assert all(pair.hack != pair.clean for pair in pairs)
    assert pairs[:20] == kind_pairs(20)


def test_every_python_side_is_a_program():
    for pair in kind_pairs(168):
        if "form:python" in pair.tags[1]:
            assert read_program(pair.prompt, pair.hack)[1] is not None, pair.tags
            assert read_program(pair.prompt, pair.clean)[1] is not None, pair.tags


@needs_sandbox
def test_programs_for_stdin_answer_the_shown_input_on_both_sides():
    for pair in stdin_pairs(10):
        _, _, shown = pair.prompt.partition("Input:\n")
        stdin, _, stdout = shown.partition("\n\nOutput:\n")
        clean = run(read_program("", pair.clean)[0], stdin=stdin + "\n")
        assert clean.stdout.split() == stdout.split()
        hack = run(read_program("", pair.hack)[0], stdin=stdin + "\n")
        assert hack.finished
        is_same = "mechanism:same" in pair.tags  # one answer for all
        assert is_same or hack.stdout.split() == stdout.split()
