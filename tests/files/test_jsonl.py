import gzip
import json
import math
import random
import tomllib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import AssayError, DataError, UsageError
from assay.files import jsonl
from assay.files.jsonl import dumps, is_deep, loads, read_json, read_jsonl
from assay.models import checkpoint
from assay.models.checkpoint import list_tensors
from assay.models.frame import Frame
from assay.poc.responses import adapters
from assay.poc.responses.adapters import load_adapter
from assay.vhack.directions.basis import basis
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.file import read_delta_lengths

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_what_is_written_reads_back_the_same(value):
    text = dumps(value)
    assert "\n" not in text
    assert loads(text, "here") == value
    assert dumps(loads(text, "here")) == text


def test_canonical_form():
    assert dumps({"b": 1, "a": [0.1, "é", None, True]}) == '{"b":1,"a":[0.1,"é",null,true]}'


def test_numpy_scalars_are_written_as_numbers():
    value = np.float32(0.1)
    text = dumps({"n": np.int64(3), "x": value, "y": np.bool_(True)})
    assert text == '{"n":3,"x":0.10000000149011612,"y":true}'
    assert np.float32(loads(text, "here")["x"]) == value


@pytest.mark.parametrize(
    "bad",
    [
        math.nan,
        [math.inf],
        {"x": np.float32("nan")},
        {1, 2},
        b"bytes",
        "\ud800",
        np.zeros(2),
        {(1, 2): 3},
    ],
)
def test_refuses_values_without_a_json_form(bad):
    with pytest.raises(UsageError, match="not JSON"):
        dumps(bad)


def test_refuses_a_value_that_holds_itself():
    endless = []
    endless.append(endless)
    with pytest.raises(UsageError, match="not JSON"):
        dumps(endless)


BAD_LINES = {
    "NaN": '{"x":NaN}',
    "infinity": '{"x":-Infinity}',
    "too large": '{"x":1e999}',
    "twice": '{"x":1,"y":2,"x":3}',
    "twice among many": "{" + "".join(f'"{n}":0,' for n in range(200_000)) + '"199999":1}',
    "nested twice": '{"a":{"x":1,"x":1}}',
    "list": "[1]",
    "number": "7",
    "torn": '{"x":1',
    "two": '{"x":1}{"y":2}',
    "byte order mark": '\ufeff{"x":1}',
    "surrogate": '{"x":"\\ud800"}',
    "digits": '{"x":' + "9" * 5000 + "}",
    "deep": '{"x":' + "[" * 200_000 + "}",
    "deeper than it can be shown": '{"x":' + "[" * 900 + "]" * 900 + "}",
    "deeper than anything": '{"x":' + "[" * 64 + "1" + "]" * 64 + "}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text('{"ok":1}\n' + line + "\n", encoding="utf-8")
    read = read_jsonl(path)
    assert next(read) == (1, {"ok": 1})
    with pytest.raises(DataError, match=r"records\.jsonl, line 2: "):
        next(read)


def test_a_long_list_is_not_a_deep_one():
    text = '{"x":' + "[" * 60 + ",".join(["[]"] * 1000) + "]" * 60 + "}"
    assert loads(text, "text")["x"]
    assert is_deep({"a": [1]}, 2)
    assert not is_deep({"a": [1]}, 3)


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"x":"\xff"}\n')
    with pytest.raises(DataError, match="line 1"):
        list(read_jsonl(path))


def test_a_path_that_no_file_can_have_is_refused():
    """A file of TOML can hold one."""
    with pytest.raises(DataError, match="Invalid argument"):
        list(read_jsonl("a\0b"))


def test_lines_are_numbered_and_the_last_needs_no_line_end(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a":"\u2028"}\r\n{"b":2}', encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"a": "\u2028"}), (2, {"b": 2})]


def test_empty_lines_at_the_end_are_passed_over_and_others_are_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a":1}\n\n  \r\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1})]
    path.write_text('{"a":1}\n\n  \n{"b":2}\n')
    with pytest.raises(DataError, match="line 2: empty"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        (b'[\n{"a":1}]', "JSON array"), (b'{\r\n"a":1}', "several lines"), (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"PK\x03\x04", "zip"), (b"PAR1\0\n", "parquet"), ("{}".encode("utf-16"), "UTF-16"),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_named(tmp_path, content, shape):
    (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"line 1: this is .*{shape}") as error:
        list(read_jsonl(tmp_path / "records.jsonl"))
    assert error.value.do


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.files.jsonl.LONGEST_LINE", 10)
    path = tmp_path / "records.jsonl"
    path.write_text('{"a":1}\n{"a":"' + "x" * 100, encoding="utf-8")
    with pytest.raises(DataError, match="line 2: longer than 10 bytes"):
        list(read_jsonl(path))


@pytest.mark.parametrize("read", [lambda p: list(read_jsonl(p)), read_json])
def test_a_missing_file_or_directory_is_a_data_error(tmp_path, read):
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match="directory"):
        read(tmp_path)


def test_read_json_reads_one_document_over_several_lines(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"sigma": 1e-5}, indent=2))
    assert read_json(path) == {"sigma": 1e-5}
    path.write_text("{} {}")
    with pytest.raises(DataError, match="calibration"):
        read_json(path)


PLAIN = ["# pins", "[round]", "length = 8", "[[nodes]]", "key = 'a'", "id = 1", "id = [\n1,"]
ODD = (
    "[[nodes]]| [[nodes]]|[nodes.of]|  [nodes.of]|[nodes]|nodes = 1|[[nodes.of]]|]|x = "
    "[|[1],|[[nodes]] # a|"
)
ODD += (
    f"[[nodes]]\r||t = {3 * chr(34)}|{3 * chr(34)}|u = {3 * chr(39)}|{3 * chr(39)}|y = 0x{'f' * 16}"
)


def test_tables_of_nodes_that_are_known_are_read_as_the_parser_reads_the_whole(tmp_path):
    chance = random.Random(0)
    counts = Counter[bool]()
    for _ in range(4000):
        pieces = chance.choices(PLAIN, k=chance.randrange(12)) + chance.choices(
            ODD.split("|"), k=chance.randrange(3)
        )
        chance.shuffle(pieces)
        text = "\n".join(pieces)
        (tmp_path / "pins.toml").write_bytes(text.encode())
        try:
            wanted = tomllib.loads(text)
            error = ""
        except ValueError as fault:
            wanted = {}
            error = str(fault)
        try:
            found = jsonl.read_toml(tmp_path / "pins.toml")
            refused = ""
        except DataError as fault:
            found = wanted
            refused = fault.seen
        assert (found, error in refused) == (wanted, True)
        counts[not refused and str(found.get("nodes")).count("{") > 1] += 1
    assert counts[True] > 50


def test_a_change_of_one_node_parses_that_node(tmp_path, monkeypatch):
    """Parsing ten thousand of them held every message up for half a second."""
    parsed = []
    loads = tomllib.loads
    path = tmp_path / "pins.toml"
    monkeypatch.setattr(jsonl.tomllib, "loads", lambda text: parsed.append(text) or loads(text))
    tables = [f'[[nodes]]\nkey = "changed_{i}"\n' for i in range(1000)]
    path.write_text("schema = 1\n" + "".join(tables) + "[round]\nseq_len = 8\n")
    jsonl.read_toml(path)
    del parsed[:]
    tables[7] = '[[nodes]]\nkey = "another"\n'
    path.write_text("schema = 1\n" + "".join(tables) + "[round]\nseq_len = 9\n")
    found = jsonl.read_toml(path)
    assert (found["round"], found["nodes"][7], len(found["nodes"])) == (
        {"seq_len": 9},
        {"key": "another"},
        1000,
    )
    assert sum(map(len, parsed)) < 200


def test_a_value_that_would_take_all_memory_never_reaches_the_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MOST_PARTS", 1000)
    assert len(loads('{"a":[' + "0," * 990 + "0]}", "here")["a"]) == 991
    monkeypatch.setattr(jsonl.json, "loads", lambda *given, **how: pytest.fail("it was parsed"))
    for text in (
        '{"a":[' + "[]," * 500 + "[]]}",
        '{"a":' + "[" * 1001,
        '{"a":{' + ",".join(['"":1'] * 1001) + "}}",
    ):
        (tmp_path / "a.json").write_text(text)
        for read in (read_json, lambda path: list(read_jsonl(path))):
            with pytest.raises(DataError, match="more than 1000"):
                read(tmp_path / "a.json")


def _adapter(path):
    (path.parent / "adapter_config.json").write_text("{}")
    return load_adapter(path.parent)


@pytest.mark.parametrize(
    "read", [Basis.load, read_delta_lengths, Frame.load, list_tensors, _adapter]
)
def test_tensors_with_a_header_that_takes_all_memory_never_reach_the_library(
    tmp_path, monkeypatch, read
):
    for module in (basis, checkpoint):
        monkeypatch.setattr(
            module, "safe_open", lambda *given, **how: pytest.fail("the library was called")
        )
    monkeypatch.setattr(adapters, "load_file", lambda *given: pytest.fail("the library was called"))
    name = "adapter_model.safetensors" if read is _adapter else "model.safetensors"
    for header, size in ((2**26, 2**27), (2**62, 100), (0, 0)):
        with (tmp_path / name).open("wb") as file:  # as a sparse file it takes no disk
            file.write(header.to_bytes(8, "little"))
            file.truncate(size or 2**33)
        if size or read is not list_tensors:  # of which a checkpoint may be as large
            with pytest.raises(AssayError):
                read(tmp_path if read is list_tensors else tmp_path / name)


def test_a_key_of_many_parts_never_reaches_the_parser():
    for text in (
        "a" + ".a" * 50_000 + " = 1",
        '"="' + ".a" * 50_000 + " = 1",
        "[a" + " . a" * 50_000 + "]",
    ):
        with pytest.raises(ValueError, match="a key of more than 64 parts"):
            jsonl._parse(text)
    assert jsonl._parse("x = [" + "{a = 0.5}, " * 100 + "]")["x"][99] == {"a": 0.5}
