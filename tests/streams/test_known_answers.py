"""The published streams: integers exactly, floats within 8 ulp or 4e-6 (they round the angle before
its cosine).
"""

import json
from pathlib import Path

import numpy as np
import pytest

from assay.streams import seed32
from assay.streams.arrays import as_tensor, digest

KNOWN = json.loads((Path(__file__).parents[1] / "vectors" / "poc_kat.json").read_text())


def to_numpy(array):
    return as_tensor(array).cpu().numpy()


def assert_close(values, published, scale=1.0):
    """Within 8 ulp, or 4e-6 times ``scale``, whichever is more."""
    published = np.asarray(published, np.float32)
    allowed = np.maximum(8 * np.spacing(np.abs(published)), 4e-6 * scale)
    wrong = np.abs(np.asarray(values, np.float64) - published) > allowed
    assert not wrong.any(), (np.asarray(values)[wrong], published[wrong])


def normal(backend, seed, n):
    return to_numpy(backend.normals([seed], n))[0]


def name(row):
    return f"{row['block_hash']}_{row['public_key']}_nonce"


def test_every_kind_has_rows():
    kinds = {
        "seed32",
        "hash32",
        "uniform",
        "normal",
        "signs",
        "permutation",
        "inputs",
        "target",
        "householder",
    }
    assert {kind for kind in kinds if KNOWN[kind]} == kinds


def test_seeds():
    assert [seed32(row["text"]) for row in KNOWN["seed32"]] == [
        row["seed"] for row in KNOWN["seed32"]
    ]


def test_hashes(backend):
    for row in KNOWN["hash32"]:
        hashes = backend.hashes([row["seed"]], max(row["index"]) + 1)
        assert digest(hashes[:, :65536]) == row["sha256_first_65536_le_u32"]
        assert to_numpy(hashes)[0, row["index"]].tolist() == row["hash"]


def test_uniforms(backend):
    for row in KNOWN["uniform"]:
        uniforms = backend.uniforms([row["seed"]], row["n"])
        assert digest(uniforms) == row["sha256_le_f32"]
        assert to_numpy(uniforms)[0, :16].tolist() == row["first"]


@pytest.mark.parametrize("row", KNOWN["normal"], ids=lambda row: f"{row['seed']:08x}-{row['n']}")
def test_normals(backend, row):
    values = normal(backend, row["seed"], row["n"])
    assert_close(values[: len(row["first"])], row["first"])
    assert_close(values[-len(row["last"]) :], row["last"])
    exact = values.astype(np.float64)
    assert exact.mean() == pytest.approx(row["mean"], abs=1e-6)
    assert (exact**2).sum() == pytest.approx(row["sumsq"], rel=1e-6, abs=1e-6)


def test_signs(backend):
    for row in KNOWN["signs"]:
        signs = backend.signs([seed32(f"{name(row)}_{row['nonce']}_signs")], row["dim"])
        assert digest(signs) == row["sha256_i8"]
        assert to_numpy(signs)[0, :16].tolist() == row["first"]


def test_permutations(backend):
    for row in KNOWN["permutation"]:
        permutation = backend.permutations(
            [seed32(f"{name(row)}_{row['nonce']}_permutations")], row["size"]
        )
        assert digest(permutation) == row["sha256_le_i64"]
        assert to_numpy(permutation)[0, :12].tolist() == row["first"]


def test_pick_of_the_published_nonce(backend):
    picked = to_numpy(backend.picks([seed32("block_alpha_node_A_nonce_0_pick_12")], 1024, 12))
    assert picked[0].tolist() == [985, 906, 607, 562, 209, 439, 22, 344, 817, 758, 637, 798]
