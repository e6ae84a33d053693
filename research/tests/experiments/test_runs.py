"""The run store: cells once, continued after a crash, refused with other settings."""

import json

import pytest
from assay_research.runs.runs import open_run, read_run, run_folder

from assay.errors import DataError, StorageError, UsageError

SETTINGS = {"seq_len": 8, "dtype": "float32"}


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
        with pytest.raises(UsageError, match=r"another (seq_len|device)"), open_run(tmp_path, "weights", other):
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


HEADER = {"kind": "assay.poc.experiment", "schema": 1, "experiment": "weights", "settings": {}, "origin": {}}


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", '{"kind":"assay.poc.proof"}\n', "nonsense\n"]
    + [json.dumps(HEADER | {name: odd}) for name, odd in (("schema", 2), ("settings", 5), ("origin", None))],
)
def test_other_files_are_refused(text: str, tmp_path):
    (tmp_path / "weights.jsonl").write_text(text)
    with pytest.raises(DataError):
        read_run(tmp_path, "weights")


@pytest.mark.parametrize("line", ["{}", '{"key":["one"]}', '{"origin":1}', '{"key":null,"origin":{}}'])
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
