import json

import numpy as np
import pytest

from assay import streams
from assay.streams.backends import digest

NUMPY = streams.get_backend("numpy")
TEXT = "block_alpha_node_A_nonce0"


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("hash", "hashes"),
        ("uniform", "uniforms"),
        ("gumbel", "gumbels"),
        ("normal", "normals"),
        ("signs", "signs"),
        ("permutation", "permutations"),
    ],
)
def test_printed_values_read_back_to_the_same_bits(kind, method, backend, assay):
    result = assay("streams", kind, "--seed-text", TEXT, "-n", 33, "--backend", backend, "--json")
    assert result.code == 0
    printed = json.loads(result.out)
    assert printed["schema"] == "assay.streams/1"
    expected = getattr(NUMPY, method)(streams.seeds([TEXT]), 33)[0]
    assert np.array_equal(np.array(printed["values"]).astype(expected.dtype), expected)
    assert printed["sha256"] == digest(expected)
    plain = assay("streams", kind, "--seed-text", TEXT, "-n", 33, "--backend", backend).out.split()
    assert [float(value) for value in plain] == [float(value) for value in printed["values"]]


def test_known_answer(assay):
    values = json.loads(assay("streams", "hash", "--seed-text", TEXT, "-n", 4, "--json").out)["values"]
    assert [f"{value:08x}" for value in values] == ["c8921caf", "520b1d87", "dbbeca62", "c8a88389"]


def test_strength_and_dtype(assay):
    strong = json.loads(assay("streams", "normal", "--seed-text", TEXT, "-n", 20, "--strength", 256, "--json").out)
    assert np.array_equal(np.float32(strong["values"]), NUMPY.normals(streams.seeds([TEXT], 256), 20)[0])
    short = json.loads(assay("streams", "normal", "--seed-text", TEXT, "-n", 20, "--dtype", "bfloat16", "--json").out)
    assert np.array_equal(
        np.float32(short["values"]), NUMPY.normals(streams.seeds([TEXT]), 20, "bfloat16")[0].float().numpy()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ("-n", 0),
        ("-n", -1),
        ("-n", "many"),
        ("-n", 10**12),
        ("--backend", "cupy"),
        ("--device", "tpu"),
        ("--strength", 64),
        ("--dtype", "float8"),
        ("--seed-text", "\udcff"),
    ],
)
def test_bad_input_is_one_message_and_code_2(wrong, assay):
    arguments = {"--seed-text": "t", "-n": 4} | dict([wrong])
    result = assay("streams", "normal", *[item for pair in arguments.items() for item in pair])
    assert result.code == 2
    assert result.out == ""
    assert result.err.strip()
    assert "Traceback" not in result.err
