"""The run store, the page of a run, the spread of blocks, and the way of the experiments through
pipelines.
"""

import json
import math

import numpy as np
import pytest
from assay_research.runs import report as _report
from assay_research.runs.report import Section, build_report
from assay_research.runs.runs import open_run, read_run, run_folder
from assay_research.runs.spread import spread_of
from assay_research.runs.states import effective_dimension, published

from assay import stats
from assay.errors import DataError, StorageError, UsageError
from assay.poc import HFEngine, Round, get_pipeline, prove

SETTINGS = {"seq_len": 8, "dtype": "float32"}
HEADER = {
    "kind": "assay.poc.experiment",
    "schema": 1,
    "experiment": "weights",
    "settings": {},
    "origin": {},
}
NONCES = range(11)  # not a multiple of the batch: the last one is padded


def test_cells_come_back_in_their_order(tmp_path):
    with open_run(tmp_path / "a", "weights", SETTINGS) as run:
        assert run.done == frozenset()
        run.append("two", {"mean": 1.5})
        run.append("one", {"mean": 0.5})
        assert not read_run(tmp_path / "a", "weights").complete
    read = read_run(tmp_path / "a", "weights")
    assert read.complete
    assert [cell["key"] for cell in read.cells] == ["two", "one"]
    assert (read.cells[0]["mean"], read.settings, read.experiment) == (1.5, SETTINGS, "weights")
    assert "versions" in read.origins[0]


def test_a_broken_run_continues_after_its_last_whole_line(tmp_path):
    def stopped():
        with open_run(tmp_path, "weights", SETTINGS) as run:
            run.append("one", {"mean": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    partial = tmp_path / "weights.jsonl.partial"
    with partial.open("a") as file:
        file.write('{"key":"two","me')
    assert [cell["key"] for cell in read_run(tmp_path, "weights").cells] == ["one"]
    with open_run(tmp_path, "weights", SETTINGS) as run:
        assert run.done == {"one"}
        run.append("two", {"mean": 1.0})
    assert [cell["key"] for cell in read_run(tmp_path, "weights").cells] == ["one", "two"]
    assert not partial.exists()


def test_a_finished_run_can_be_extended_and_a_cell_is_never_measured_twice(tmp_path):
    for key in ("one", "two"):
        with open_run(tmp_path, "weights", SETTINGS) as run:
            run.append(key, {})
            with pytest.raises(UsageError, match="twice"):
                run.append(key, {})
    assert len(read_run(tmp_path, "weights").cells) == 2


def test_values_that_are_no_json_leave_the_file_whole(tmp_path):
    with open_run(tmp_path, "weights", SETTINGS) as run:
        with pytest.raises(UsageError, match="not JSON"):
            run.append("one", {"mean": float("nan")})
        run.append("one", {"mean": 1.0})
    assert len(read_run(tmp_path, "weights").cells) == 1


def test_other_settings_are_refused_and_named(tmp_path):
    with open_run(tmp_path, "weights", SETTINGS) as run:
        run.append("one", {})
    before = (tmp_path / "weights.jsonl").read_bytes()
    for other in ({**SETTINGS, "seq_len": 9}, {"dtype": "float32"}, {**SETTINGS, "device": "cpu"}):
        with (
            pytest.raises(UsageError, match=r"another (seq_len|device)"),
            open_run(tmp_path, "weights", other),
        ):
            pass
    assert (tmp_path / "weights.jsonl").read_bytes() == before
    with open_run(tmp_path, "weights", SETTINGS) as run:
        assert run.done == {"one"}


def test_one_writer_at_a_time(tmp_path):
    with (
        open_run(tmp_path, "weights", SETTINGS),
        pytest.raises(StorageError, match="another process"),
        open_run(tmp_path, "weights", SETTINGS),
    ):
        pass


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", '{"kind":"assay.poc.proof"}\n', "nonsense\n"]
    + [
        json.dumps(HEADER | {name: odd})
        for name, odd in (("schema", 2), ("settings", 5), ("origin", None))
    ],
)
def test_other_files_are_refused(text: str, tmp_path):
    (tmp_path / "weights.jsonl").write_text(text)
    with pytest.raises(DataError):
        read_run(tmp_path, "weights")


@pytest.mark.parametrize(
    "line", ["{}", '{"key":["one"]}', '{"origin":1}', '{"key":null,"origin":{}}']
)
def test_a_line_that_no_run_wrote_is_an_error_that_names_it(line: str, tmp_path):
    with open_run(tmp_path, "weights", SETTINGS) as run:
        run.append("one", {})
    with (tmp_path / "weights.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"weights\.jsonl, line 3: neither"):
        read_run(tmp_path, "weights")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "x" * 65])
def test_run_names_are_plain(name: str, tmp_path):
    with pytest.raises(UsageError, match="run name"):
        run_folder(tmp_path, name)
    assert run_folder(tmp_path, "night-1.2_a") == tmp_path / "night-1.2_a"


@pytest.fixture
def registered(monkeypatch):
    """Two experiments whose sections are drawn by functions of this test."""
    monkeypatch.setattr(
        _report, "SECTIONS", dict.fromkeys(("second", "first"), f"{__name__}:shown")
    )


def shown(run) -> Section:
    return Section(f"{run.experiment}: {len(run.cells)} cells", "about", {})


def measure(folder, experiment: str, count: int) -> None:
    with open_run(folder, experiment, {"seq_len": 8, "blocks": ["a", "b"]}) as run:
        for index in range(count):
            run.append(str(index), {"value": index})


def test_sections_come_in_the_order_of_the_table(registered, tmp_path):
    measure(tmp_path, "first", 3)
    one = build_report(tmp_path).read_text()
    assert "first: 3 cells" in one
    assert "second" not in one
    measure(tmp_path, "second", 1)
    both = build_report(tmp_path).read_text()
    assert both.index("second: 1 cells") < both.index("first: 3 cells")
    assert "a, b" in both
    assert "has not reached its end" not in both
    assert build_report(tmp_path).read_text() == both


def test_a_folder_without_experiments(tmp_path):
    with pytest.raises(DataError, match="holds no experiment"):
        build_report(tmp_path)


def test_equal_blocks_fall_inside_the_band_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.binomial(3000, 0.59, size=(400, 3))
    found = [spread_of(row.tolist(), [3000] * 3) for row in draws]
    inside = sum(s.low <= s.value <= s.high for s in found)
    low, high = stats.proportion_interval(inside, 400, 0.999)
    assert low <= 0.95 <= high
    assert np.mean([s.p_value for s in found]) == pytest.approx(0.5, abs=0.06)


def test_the_published_spreads():
    """Seed tables: 1.1 points on 14 880 nonces a block is noise, 10.3 points is not."""
    sign_flips = spread_of([8645, 8764, 8809], [14880] * 3)
    assert sign_flips.value == pytest.approx(0.011, abs=2e-4)
    assert sign_flips.inside
    assert sign_flips.high == pytest.approx(0.0148, abs=2e-4)
    hooks = spread_of([9300, 9642, 8110], [14880] * 3, width=2048)
    assert not hooks.inside
    assert hooks.p_value < 1e-6


def test_a_head_widens_the_band_and_more_nonces_do_not_help():
    narrow = spread_of([590, 600], [1000, 1000])
    wide = spread_of([590, 600], [1000, 1000], width=64)
    assert wide.high > narrow.high == wide.nonces_high
    assert wide.p_value > narrow.p_value
    many = spread_of([590_000, 600_000], [10**6] * 2, width=64)
    assert many.high > 5 * many.nonces_high


@pytest.fixture(scope="module")
def engine(small_model) -> HFEngine:
    return HFEngine(small_model, batch_size=4, seq_len=16)


def test_distances_are_those_of_a_proof(small_model, engine):
    names = ("poc-2.0", "permutation", "random-head")
    round = Round(block_hash="b", public_key="k", seq_len=16)
    found = published(engine, round, [get_pipeline(name) for name in names], NONCES)
    for name in names:
        rounds = Round(block_hash="b", public_key="k", seq_len=16, preset=name)
        proof = prove(small_model, rounds, NONCES, engine=engine)
        assert found[name].tolist() == proof.distances.astype(np.float32).tolist()


@pytest.mark.parametrize("name", ["artifact", "layer-reflections", "hardened"])
def test_vectors_are_those_of_a_proof(name: str, small_model, engine):
    round = Round(block_hash="b", public_key="k", seq_len=16, preset=name)
    found = published(engine, round, [get_pipeline(name)], NONCES)[name]
    proof = prove(small_model, round, NONCES, engine=engine)
    assert found.astype(np.float16).tolist() == [record.vector.tolist() for record in proof.records]


def test_the_effective_dimension():
    rng = np.random.default_rng(2)
    isotropic = rng.normal(size=(800, 48))
    assert effective_dimension(isotropic) == pytest.approx(48, rel=0.05)
    few = isotropic.copy()
    few[:, 4:] *= 1e-3
    assert effective_dimension(few) == pytest.approx(4, rel=0.1)
    assert effective_dimension(np.ones((5, 7))) == pytest.approx(1)
    with pytest.raises(UsageError, match="1 states"):
        effective_dimension(np.ones((1, 7)))
    for value in (0.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="1 of 3 states that are zero or not finite"):
            effective_dimension(np.array([[1.0, 2.0], [value, value], [3.0, 1.0]]))
