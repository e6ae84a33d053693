"""Errors of assay cross processes whole."""

import pickle

import pytest

import assay.errors
from assay.errors import AssayError, ProofMismatch
from assay.poc.net.refusals import Refusal

KINDS = [
    kind
    for kind in vars(assay.errors).values()
    if isinstance(kind, type) and issubclass(kind, AssayError)
]


@pytest.mark.parametrize(
    "error",
    [
        *(kind("seen", wanted="wanted", do="do") for kind in KINDS),
        ProofMismatch("seen", wanted="wanted", do="do", field="digest"),
        Refusal(503, "seen", wanted="wanted", do="do", retry_after=3, fields={"fields": ["busy"]}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_what_a_message_quotes_is_bounded_and_cannot_steer_a_terminal():
    error = AssayError("a" * 10**6, wanted="\x1b[2J one\nother line \u202e", do="grüße: 一二")
    assert len(error.seen) == assay.errors.LONGEST_PART + 1
    assert (error.wanted, error.do) == ("\\x1b[2J one\\nother line \\u202e", "grüße: 一二")
    assert str(error).count("\n") == 2
