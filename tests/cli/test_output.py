"""Tables and progress on terminals and in pipes."""

import sys

import click
import pytest

from assay.errors import UsageError
from assay.framework import output as _output
from assay.loading_progress import report_progress


def test_a_pipe_gets_tables_without_boxes_or_folds(capsys):
    identity = "msg_" + "0" * 200
    _output.table(("id", "status", "nonces"), [(identity, "dead", 7)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].split() == [identity, "dead", "7"]


def test_a_title_is_one_line_in_a_pipe_and_no_line_ends_with_spaces(capsys):
    _output.table(("id", "status"), [(1, "dead"), (2, "ok")], "2 of 3 messages reached a node")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 3 messages reached a node"
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_names_and_numbers_whole(width, capsys, monkeypatch):
    """Rich alone cuts names that a reader copies, and words of the head, into pieces."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    reason = "a reason of more words than the screen has columns, which is folded between words"
    columns = ("model", "parameters", "layers", "hidden", "vocabulary", "why")
    _output.table(columns, [("pretrained:smollm2", "134.5 M", 30, 576, 49152, reason)], "models")
    shown = click.unstyle(capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= width
    assert all(word in shown for word in ("pretrained:smollm2", *columns, "134.5 M", "49152"))


@pytest.mark.parametrize("columns", ["0", "²"])
def test_a_width_that_is_none_is_not_taken(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        _output.table(("model", "layers"), [("pretrained:smollm2", 30)])
        assert "pretrained:smollm2" in capsys.readouterr().out


def test_what_others_wrote_does_not_steer_the_terminal(capsys):
    hostile = "\x1b]0;title\x07 of a key\r\nnode_B  honest"
    _output.table(("key", "why"), [(hostile, _output.Lines("µ ≤ 2\nand more"))], title=hostile)
    _output.errors(UsageError(hostile, wanted="a key", do="pass another"))
    _output.say(hostile)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert r"\x1b]0;title\x07 of a key\r" in text
        assert not set("\x1b\x07\r") & set(text)
    assert "µ ≤ 2" in said.out
    assert not any(line.startswith("node_B") for line in said.out.splitlines())


def test_what_others_wrote_takes_a_bounded_place(capsys):
    _output.table(("pair", "tags"), [(0, "t" * 10_000)])
    assert 400 < capsys.readouterr().out.count("t") < 600


def test_progress_in_a_pipe_is_a_line_every_few_seconds(capsys, monkeypatch):
    clock = iter([1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(_output.time, "monotonic", lambda: next(clock))
    with _output.progress_bar("proving") as update:
        for done in (10, 60, 70, 120):
            update(done, 120)
    assert capsys.readouterr().err.splitlines() == [
        "proving: 60 of 120 nonces, 10.0 nonces/s, at most 6 s left",
        "proving: 120 of 120 nonces, 10.0 nonces/s, 0 s left",
    ]


def test_progress_in_a_terminal_without_a_cursor_is_lines_too(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(_output, "PAUSE", 0.0)
    monkeypatch.setenv("TERM", "dumb")
    with _output.progress_bar("proving") as progress:
        for done in range(3):
            progress(done, 3)
    assert "proving: 2 of 3 nonces" in capsys.readouterr().err


def test_loading_that_takes_a_moment_is_told_until_it_is_done(capsys, monkeypatch):
    clock = iter([0.0, 0.5, *[2.0] * 3, *[8.0] * 3, *[9.0] * 3])
    monkeypatch.setattr(_output.time, "monotonic", lambda: next(clock))
    with _output.loading_bar():
        for done in (10, 40, 70, 100):
            report_progress("reading weights", done * 10**6, 100 * 10**6)
    report_progress("reading weights", 1, 2)  # no listener
    assert capsys.readouterr().err.splitlines() == [
        "reading weights: 70 of 100 million, 5.0 million/s, at most 6 s left"
    ]


def test_columns_of_words_begin_at_the_left_and_those_of_numbers_end_at_the_right(capsys):
    rows = [("a", "short", 1, "fd28"), ("b", "a longer word", "1000 (5 to 9)", "0a3f9c")]
    _output.table(("id", "state", "count", "hash"), rows)
    head, first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert first.index("short") == second.index("a longer word") == head.index("state")
    assert first.index("1 ") > second.index("1000")
    assert first.index("fd28") == second.index("0a3f9c")
