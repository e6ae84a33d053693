import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import DataError, UsageError
from assay.files import jsonl
from assay.files.jsonl import dumps, is_deep, loads, read_json, read_jsonl

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
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
    with pytest.raises(UsageError):
        dumps(bad)


def test_refuses_a_value_that_holds_itself():
    endless = []
    endless.append(endless)
    with pytest.raises(UsageError):
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
    lines = read_jsonl(path)
    assert next(lines) == (1, {"ok": 1})
    with pytest.raises(DataError) as refusal:
        next(lines)
    assert refusal.value.seen.startswith(f"{path}, line 2: ")


def test_a_long_list_is_not_a_deep_one():
    text = '{"x":' + "[" * 60 + ",".join(["[]"] * 1000) + "]" * 60 + "}"
    assert loads(text, "text")["x"]
    assert is_deep({"a": [1]}, 2)
    assert not is_deep({"a": [1]}, 3)


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"x":"\xff"}\n')
    with pytest.raises(DataError) as refusal:
        list(read_jsonl(path))
    assert refusal.value.seen.startswith(f"{path}, line 1: ")


def test_a_path_that_no_file_can_have_is_refused():
    """A file of TOML can hold one."""
    with pytest.raises(DataError):
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
    with pytest.raises(DataError) as refusal:
        list(read_jsonl(path))
    assert refusal.value.seen.startswith(f"{path}, line 2: ")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'[\n{"a":1}]', "JSON array"),
        (b'{\r\n"a":1}', "several lines"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"PK\x03\x04", "zip"),
        (b"PAR1\0\n", "parquet"),
        ("{}".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_in_another_format_is_named(tmp_path, content, name):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        list(read_jsonl(path))
    assert refusal.value.seen.startswith(f"{path}, line 1: ")
    assert name in refusal.value.seen


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.files.jsonl.LONGEST_LINE", 10)
    path = tmp_path / "records.jsonl"
    path.write_text('{"a":1}\n{"a":"' + "x" * 100, encoding="utf-8")
    with pytest.raises(DataError) as refusal:
        list(read_jsonl(path))
    assert refusal.value.seen.startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("read", [lambda p: list(read_jsonl(p)), read_json])
def test_a_missing_file_or_directory_is_a_data_error(tmp_path, read):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError) as refusal:
            read(path)
        assert refusal.value.seen.startswith(f"{path}: ")


def test_read_json_reads_one_document_over_several_lines(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"sigma": 1e-5}, indent=2))
    assert read_json(path) == {"sigma": 1e-5}
    path.write_text("{} {}")
    with pytest.raises(DataError) as refusal:
        read_json(path)
    assert refusal.value.seen.startswith(f"{path}: ")


def test_a_value_that_would_take_all_memory_never_reaches_the_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MOST_PARTS", 1000)
    assert len(loads('{"a":[' + "0," * 990 + "0]}", "here")["a"]) == 991
    monkeypatch.setattr(json, "loads", lambda *_, **options: pytest.fail("it was parsed"))
    for text in (
        '{"a":[' + "[]," * 500 + "[]]}",
        '{"a":' + "[" * 1001,
        '{"a":{' + ",".join(['"":1'] * 1001) + "}}",
    ):
        (tmp_path / "a.json").write_text(text)
        for read in (read_json, lambda path: list(read_jsonl(path))):
            with pytest.raises(DataError):
                read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"prompt,chosen,rejected\na,b,c\n", "CSV"),
        (b'"prompt","completion"\r\n"a","b"\r\n', "CSV"),
        (b'\xef\xbb\xbf{"a": 1}\n', "byte order mark"),
    ],
)
def test_a_file_in_a_common_format_is_called_by_its_name(tmp_path, content, names):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=names):
        list(read_jsonl(path))
