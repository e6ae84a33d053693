"""TOML files: what is refused before or after the parser, and with which name."""

import pytest

from assay.errors import DataError
from assay.files.toml import LONGEST_TOML, parse_toml, read_toml
from tests.wordings import refuses


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 50_000 + " = 1",
        '"="' + ".a" * 50_000 + " = 1",
        "[a" + " . a" * 50_000 + "]",
    ],
    ids=["a key", "after a string", "the name of a table"],
)
def test_a_key_of_many_parts_never_reaches_the_parser(text, monkeypatch):
    monkeypatch.setattr("tomllib.loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match="64 parts"):
        parse_toml(text)


def test_many_short_keys_are_read():
    tables = parse_toml("x = [" + "{a = 0.5}, " * 100 + "]")
    assert tables["x"][99] == {"a": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        b"a = 1\na = 2",
        b"a = 0x" + b"f" * 17,
        b"a = \xff",
        b'a = ["b\\u0000"]',
        b"a = " + b"[" * 5000 + b"]" * 5000,
        b"#" * (LONGEST_TOML + 1),
    ],
    ids=["a key twice", "a number of 68 bits", "no UTF-8", "no path", "too deep", "too long"],
)
def test_a_file_that_is_no_toml_of_assay_is_named(tmp_path, content):
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        read_toml(path)
    assert refusal.value.seen.startswith(f"{path}: ")


def test_a_byte_order_mark_is_called_by_its_name(tmp_path):
    (tmp_path / "settings.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    with refuses(DataError, "a byte order mark is called by its name"):
        read_toml(tmp_path / "settings.toml")


def test_every_whole_number_of_toml_is_read():
    assert parse_toml(f"least = {-(2**63)}\nlargest = {2**63 - 1}") == {
        "least": -(2**63),
        "largest": 2**63 - 1,
    }
