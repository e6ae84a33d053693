"""``assay poc collect``: proofs of public blocks, which several machines make to be compared and
published.
"""

import json
from dataclasses import replace

import pytest

from assay.poc import Calibration, Proof
from assay.poc.protocol.pins_file import Accepted
from assay.poc.verdict.build_noise import LeftOut
from assay.poc.verdict.calibration_file import describe_promise
from tests.poc.service.test_pins import pins

SMALL = ("--seq-len", 8, "--blocks", 3, "--nonces", 16, "--batch-size", 16, "--device", "cpu")


@pytest.fixture
def collect(told, tmp_path):
    """Collect proofs in a number format, in a folder of its name."""
    known = ("poc", "collect", "--model", "reference:qwen3", "--preset", "hardened", *SMALL)
    return lambda dtype: told(*known, "--dtype", dtype, "-o", tmp_path / dtype)


@pytest.mark.slow
def test_machines_that_prove_the_same_blocks_give_one_calibration(collect, told, tmp_path):
    folders = [tmp_path / dtype for dtype in ("float32", "bfloat16")]
    assert [collect(folder.name)["dtype"] for folder in folders] == ["float32", "bfloat16"]
    told("poc", "calibrate", *folders, "-o", tmp_path / "calibration.json")
    (build,) = Calibration.load(tmp_path / "calibration.json").builds
    assert (len(build.machines), build.n, build.formats) == (2, 3 * 16, [["bfloat16", "float32"]])
    network = pins().model_copy(update={"network": Accepted(nodes=10_000, false_convictions=1)})
    found = describe_promise(network, 1e-4, [Calibration(builds=(build,))])
    assert (found["nodes"], found["expected"]) == (10_000, None), "two machines leave none out"
    left = LeftOut(accused=0.0, low=0.0, high=0.4, worst=0.0, pairs=42, audits=200, checked=300)
    more = replace(build, left_out=left, effect=1.25)
    assert describe_promise(network, 1e-4, [Calibration(builds=(more,))])["expected"] == 4000
    one_machine = replace(more, effect=None)
    both = [Calibration(builds=(more,)), Calibration(builds=(one_machine,))]
    assert describe_promise(network, 1e-4, both)["expected"] is None, (
        "engines of one machine are none"
    )


def test_collected_proofs_say_nothing_of_where_the_model_lies(told, small_checkpoint, tmp_path):
    told("poc", "collect", "--model", small_checkpoint, *SMALL, "-o", tmp_path / "made")
    for path in (tmp_path / "made").iterdir():
        text = path.read_text()
        header = Proof.load(path).header
        assert str(small_checkpoint) not in text
        assert str(tmp_path) not in text
        assert header.round.model == header.digest
        allowed = {"kind", "schema", "round", "pipeline", "model", "fingerprint", "nonces"}
        assert set(json.loads(text.splitlines()[0])) == allowed


def test_what_is_there_is_kept_and_nothing_is_mixed(collect, told, refused, tmp_path):
    collect("float32")
    proofs = sorted((tmp_path / "float32").iterdir())
    proofs[1].unlink()
    before = proofs[0].read_bytes()
    collect("float32")
    assert proofs[0].read_bytes() == before
    assert proofs[1].exists()
    other = (
        "poc",
        "collect",
        "--model",
        "reference:qwen3",
        "--preset",
        "hardened",
        *SMALL,
        "--dtype",
        "bfloat16",
    )
    assert "another round, engine" in refused(*other, "-o", tmp_path / "float32")
    assert "whose tokens part" in refused(*other, "--preset", "decode-64", "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()
