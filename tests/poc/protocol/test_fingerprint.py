"""The fingerprint of an engine: what is written, what is read back, and the identity that calibrations are bound to."""

import json
from dataclasses import replace

import pytest

from assay.poc import Fingerprint

VALUES = {
    "engine": "hf",
    "device": "x86_64 AVX512",
    "dtype": "float32",
    "attention": "sdpa",
    "batch_size": 8,
    "seq_len": 16,
    "threads": 2,
    "torch": "2.13.0",
    "library": "transformers 5.17.0, compiled, tp 2",
}
"""As the first version wrote it into proofs and calibrations."""


def test_a_file_joins_the_kernels_to_the_library():
    read = Fingerprint.from_dict(VALUES)
    assert (read.library, read.kernels) == ("transformers 5.17.0", ("compiled", "tp 2"))
    assert json.dumps(read.as_dict()) == json.dumps(VALUES)
    assert read.id == "4d2509591f4d"
    assert replace(read, kernels=()).as_dict() == VALUES | {"library": "transformers 5.17.0"}


@pytest.mark.parametrize("text", ["", ", ", "a, ", "a,b", "transformers 5.17.0"])
def test_any_text_is_written_back_as_it_was_read(text: str):
    assert Fingerprint.from_dict(VALUES | {"library": text}).as_dict()["library"] == text


@pytest.mark.parametrize(
    "wrong", [VALUES | {"kernels": ()}, VALUES | {"colour": "red"}, {"engine": "hf", "library": ""}]
)
def test_other_fields_are_refused(wrong):
    with pytest.raises(TypeError):
        Fingerprint.from_dict(wrong)
