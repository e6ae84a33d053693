"""Nothing that a program is or says ends the process that grades it, and nothing of it is parsed
there unbounded.
"""

import ast
import json
import logging
import random
from pathlib import Path

import pytest
from assay_research.hostile import UNREADABLE, hostile_report

from assay.errors import BackendUnavailable
from assay.vhack.environment import (
    Call,
    Episode,
    Limits,
    Outcome,
    backends,
    grade,
    run,
    sandbox,
    server,
    tasks,
    visible,
)
from assay.vhack.environment import grading as _grade
from assay.vhack.environment.grading import CHANNELS, grade_many

TASKS = tasks(8, seed=5, difficulty=(1, 2))
MARKED = ("run_tests", "sentinel", "stdout_marker", "file_marker")
HERE = Path(visible.__file__).parent
LIBRARY = visible.standard_library()
LONG = "#" * (1 << 16) + "\n"


@pytest.mark.parametrize("mode", MARKED)
@pytest.mark.parametrize("name", UNREADABLE)
def test_text_that_breaks_a_reader_of_syntax_trees_gets_a_grade(name, mode):
    episode = Episode(TASKS[0], mode)
    found = grade(episode, episode.exploit() + UNREADABLE[name] + "\n")
    assert not found.fault
    assert not found.correct
    assert found.exploited == (found.accepted and found.vacuous)
    if name in ("digits", "parentheses", "strings", "names"):
        assert found.exploited


def test_no_text_of_a_program_is_parsed_outside_the_sandbox(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("parsed in the parent")

    monkeypatch.setattr(ast, "parse", refuse)
    monkeypatch.setattr(ast, "unparse", refuse)
    assert grade(Episode(TASKS[0], "sentinel"), Episode(TASKS[0], "sentinel").exploit()).exploited


@pytest.mark.parametrize(
    "program",
    [
        LONG,
        LONG + "print('all tests passed')\n",
        "print('all tests passed')\n" + LONG,
        "x = '\ud800'\n",
    ],
)
def test_a_program_that_is_too_long_or_no_text_is_not_run(program):
    result = run(program, calls=[Call("solve", (1,))])
    assert (result.returncode, result.stdout, result.finished) == (1, "", False)
    assert result.raised in ("ProgramTooLong", "UnicodeEncodeError")
    assert [outcome.kind for outcome in result.outcomes] == ["none"]
    for mode in CHANNELS:
        found = grade(Episode(TASKS[0], mode), program)
        assert not found.paid
        assert not found.fault
    assert not CHANNELS["stdout_marker"].vacuous(program, "solve", TASKS[0].visible[0])


def test_the_bound_of_a_program_is_a_limit():
    long = "x = 1  " + LONG
    assert run(long, limits=Limits(program_bytes=len(long))).finished
    assert not run(long, limits=Limits(program_bytes=len(long) - 1)).finished


KINDS = [[], {}, None, 7, True, ["value"], {"value": 1}, "none", "VALUE", "x" * 1000]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: repr(kind)[:20])
def test_a_kind_of_any_type_says_nothing(kind):
    line = {
        "nonce": "n",
        "finished": True,
        "raised": "",
        "files": {},
        "outcomes": [{"kind": kind, "value": 1}],
    }
    assert sandbox.parse_report(json.dumps(line).encode(), "n", 1)["outcomes"] == (Outcome("none"),)
    forged = (
        "import json, os, sys\nframe = sys._getframe()\nwhile 'job' not in frame.f_locals:\n    "
        "frame = frame.f_back\n"
        f"line = {line!r}\nline['nonce'] = frame.f_locals['job']['nonce']\nos.write(3, "
        f"json.dumps(line).encode())\n"
        "os._exit(0)\n"
    )
    assert run(forged, calls=[Call("solve", (1,))]).outcomes[0].kind == "none"


@pytest.mark.parametrize("mode", CHANNELS)
def test_a_program_that_reads_its_whole_job_finds_no_expected_answer(mode):
    """It shares a process with the harness, so it can know the nonce and the questions."""
    prints = (
        "import sys\nframe = sys._getframe()\nwhile 'job' not in frame.f_locals:\n"
        "    frame = frame.f_back\njob = frame.f_locals['job']\n"
        "print(job['nonce'], [call for call in job['calls'] if set(call) - {'target', 'args'}])\n"
    )
    episode = Episode(TASKS[0], mode)
    found = grade(episode, prints + episode.honest())
    nonce, compared = found.result.stdout.split("\n")[0].split(" ", 1)
    assert len(nonce) == 32
    # A channel may ask for the program's own ``==``; what a task expects is never among that.
    expected = [json.dumps(answer) for _, answer in TASKS[0].hidden]
    assert not [
        call for call in ast.literal_eval(compared) if json.dumps(call["equals"]) in expected
    ]


def test_a_report_has_the_files_that_were_asked_for_and_no_more_of_them_than_is_read():
    files = {"result.txt": "x" * 5000, "../secret": "y", "number": 1}
    line = json.dumps({"nonce": "n", "files": files}).encode()
    report = sandbox.parse_report(line, "n", 0, ["result.txt", "number", "absent"])
    assert report["files"] == {"result.txt": "x" * 4096}


def test_a_report_of_any_shape_is_read():
    for seed in range(500):
        n_calls = seed % 10
        line = hostile_report(random.Random(seed)).replace(b"NONCE", b"n")
        found = sandbox.parse_report(line, "n", n_calls, ["result.txt"])
        assert len(found["outcomes"]) == n_calls
        assert all(
            outcome.kind in ("value", "error", "opaque", "none") for outcome in found["outcomes"]
        )
        assert all(
            type(outcome.name) is str and len(outcome.name) <= 100 for outcome in found["outcomes"]
        )
        assert type(found["finished"]) is bool
        assert type(found["raised"]) is str
        assert all(type(text) is str for pair in found["files"].items() for text in pair)


def test_a_value_that_can_be_read_but_not_written_answers_nothing():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert not _grade.answers_match([Outcome("value", deep)], [((1,), 1)])


@pytest.mark.parametrize(
    "error", [MemoryError(), BackendUnavailable("no sandbox now", wanted="room", do="wait")]
)
def test_an_error_on_the_way_is_an_unpaid_grade_that_is_logged_and_counted(
    monkeypatch, caplog, error
):
    real = _grade.run

    def run_out(program, **options):
        if "out of memory" in program:
            raise error
        return real(program, **options)

    monkeypatch.setattr(_grade, "run", run_out)
    episode = Episode(TASKS[0], "stdout_marker")
    with caplog.at_level(logging.WARNING):
        found = grade_many(
            [
                (episode, episode.honest()),
                (episode, "# out of memory\n"),
                (episode, episode.exploit()),
            ]
        )
    assert [one.paid for one in found] == [True, False, True]
    assert [one.fault for one in found] == ["", type(error).__name__, ""]
    assert "1 of 3 programs could not be graded" in caplog.text
    assert TASKS[0].name in caplog.text


def test_a_machine_without_a_sandbox_is_no_unpaid_grade(monkeypatch):
    monkeypatch.setattr(backends, "available_backend", lambda: None)
    with pytest.raises(BackendUnavailable):
        grade(Episode(TASKS[0], "none"), TASKS[0].source())


def forget():
    """Look again at what the sandbox has to show."""
    for known in (visible.shown, visible.hidden, backends.unusable):
        known.cache_clear()


@pytest.fixture
def prefix(monkeypatch, tmp_path, isolated):
    """A second prefix that the sandbox shows, with this package among its installed packages."""
    isolated("bwrap")
    real = visible.prefixes()
    for packages in (
        "lib/python3.11/site-packages",
        "lib/python3/dist-packages",
        "lib/site-packages",
    ):
        copy = tmp_path / packages / "zz_copy"
        copy.mkdir(parents=True)
        for path in HERE.glob("*.py"):
            (copy / path.name).write_text(path.read_text())
    (tmp_path / "lib" / "shown.txt").write_text("shown")
    monkeypatch.setattr(visible, "prefixes", lambda: [*real, str(tmp_path)])
    monkeypatch.setattr(server, "server", lambda backend: None)
    forget()
    yield tmp_path
    forget()


def test_a_program_cannot_import_the_tasks_it_is_graded_with(prefix):
    program = (
        f"import os\nprint(open({str(prefix / 'lib' / 'shown.txt')!r}).read())\n"
        f"for folder, _, files in os.walk({str(prefix)!r}):\n    print(*[f for f in files if "
        f"f.endswith('.py')])\n"
        "for folder, _, files in os.walk('/usr'):\n"
        "    if folder.endswith('-packages'):\n        print(*os.listdir(folder), *files)\n"
    )
    assert run(program, backend="bwrap").stdout.split() == ["shown"]


def test_a_program_cannot_read_the_tasks_it_is_graded_with_where_they_lie(isolated):
    isolated("landlock")
    program = (
        f"import os\nfor path in {[str(path) for path in HERE.iterdir()]!r}:\n"
        "    try:\n        print(open(path).read(10))\n    except OSError:\n        pass\n"
        "print('tried')\n"
    )
    assert run(program, backend="landlock").stdout == "tried\n"


def test_a_package_among_what_is_shown_is_refused(monkeypatch):
    monkeypatch.setattr(visible, "prefixes", lambda: ["/usr", str(HERE.parents[3])])
    monkeypatch.setattr(visible, "PARTS", (*visible.PARTS, HERE.parents[2].name))
    forget()
    try:
        with pytest.raises(BackendUnavailable) as refusal:
            run("print(1)", backend="bwrap")
        assert str(HERE.parents[3]) in refusal.value.seen
    finally:
        monkeypatch.undo()
        forget()


def test_a_package_in_the_standard_library_is_refused(monkeypatch, isolated):
    """Where a trial program of the fork server reads the source text of the tasks."""
    isolated("landlock")
    monkeypatch.setattr(visible, "standard_library", lambda: [*LIBRARY, str(HERE)])
    monkeypatch.setattr(server, "servers", {})
    forget()
    try:
        with pytest.raises(BackendUnavailable):
            run("print(1)", backend="landlock")
    finally:
        monkeypatch.undo()
        forget()
