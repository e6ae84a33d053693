import numpy as np
import pytest

from assay import streams
from assay.streams.arrays import digest

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
def test_printed_values_read_back_to_the_same_bits(kind, method, backend, assay, told):
    printed = told("streams", kind, "--seed-text", TEXT, "-n", 33, "--backend", backend)
    assert printed["schema"] == "assay.streams/1"
    expected = getattr(NUMPY, method)(streams.seeds([TEXT]), 33)[0]
    assert np.array_equal(np.array(printed["values"]).astype(expected.dtype), expected)
    assert printed["sha256"] == digest(expected)
    plain = assay("streams", kind, "--seed-text", TEXT, "-n", 33, "--backend", backend).out.split()
    assert [float(value) for value in plain] == [float(value) for value in printed["values"]]


def test_strength_and_dtype(told):
    strong = told("streams", "normal", "--seed-text", TEXT, "-n", 20, "--strength", 256)
    assert np.array_equal(
        np.float32(strong["values"]), NUMPY.normals(streams.seeds([TEXT], 256), 20)[0]
    )
    short = told("streams", "normal", "--seed-text", TEXT, "-n", 20, "--dtype", "bfloat16")
    assert np.array_equal(
        np.float32(short["values"]),
        NUMPY.normals(streams.seeds([TEXT]), 20, "bfloat16")[0].float().numpy(),
    )
