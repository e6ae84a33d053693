"""What conftest.py does for all tests: it skips what cannot run, and undoes what a test patched."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

pytestmark = pytest.mark.no_law

@pytest.mark.needs("groff", "jq")
def test_of_two():
    raise AssertionError("it ran")

@pytest.mark.browser
def test_of_the_browser():
    raise AssertionError("it ran")

def test_of_one_that_it_names_itself(needs):
    needs("jq")
    raise AssertionError("it ran")

def test_of_none(needs):
    needs()

@pytest.mark.soak
def test_of_a_soak():
    raise AssertionError("it ran")
"""
PATCHED = """
import ast
import builtins
import pathlib

import pytest

pytestmark = pytest.mark.no_law

@pytest.mark.parametrize(
    "place, name", [(ast, "parse"), (builtins, "open"), (pathlib.Path, "read_text")]
)
def test_of_a_patched(place, name, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("it was called")

    monkeypatch.setattr(place, name, refuse)
    refuse()
"""


@pytest.fixture
def bare(tmp_path):
    """Run pytest with options in a process that finds no program."""

    def run(*options, tests=TESTS, **variables):
        (tmp_path / "test_bare.py").write_text(tests)
        settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "conftest"]
        variables = {"PATH": str(tmp_path), "HOME": "/nonexistent"} | variables
        command = [sys.executable, "-m", "pytest", *settings, *options, str(tmp_path)]
        return subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "workers"])
def test_what_needs_a_missing_program_is_skipped_and_the_packages_are_named(bare, workers):
    ended = bare(*workers)
    *_, advice, counts = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stdout
    assert counts.startswith("1 passed, 3 skipped")
    assert advice.startswith("3 tests")
    assert advice.endswith("apt-get install --no-install-recommends chromium groff-base jq")


@pytest.mark.slow
def test_where_ci_runs_a_missing_program_is_a_failure(bare):
    ended = bare(CI="1")
    assert ended.returncode == 1
    assert "1 passed" in ended.stdout
    assert "skipped" not in ended.stdout


@pytest.mark.slow
def test_a_soak_runs_what_other_runs_leave_out(bare):
    ended = bare(ASSAY_SOAK="1")
    assert ended.stdout.splitlines()[-1].startswith("1 failed, 1 passed, 3 skipped in ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "workers"])
def test_what_a_failed_test_patched_does_not_reach_its_report(bare, workers):
    ended = bare(*workers, tests=PATCHED)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("3 failed in ")
    assert ended.stdout.count("monkeypatch.setattr(place, name, refuse)") == 3  # sources are shown
