"""The drawing and the walks of docs/architecture.md are those of the code.

Every walk runs on a small or bundled model while `sys.setprofile` records the functions that are
entered, in all threads. Nothing is patched. The stops must occur among these in the order of the
table. A function may be entered elsewhere as well, and a generator is entered whenever it goes on,
so two of the functions (`Backend.normals` and `HFPrefill.run`) could also stand a row later.
"""

import ast
import json
import re
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import assay
from tests.docs.shell import ROOT
from tests.poc.validator.conftest import BATCH, Running, body_of, nodes_text, pins_text, proof_of
from tests.vhack.training.conftest import checkpoint, pairs  # noqa: F401  # fixtures
from tests.waiting import until

pytestmark = pytest.mark.no_law  # the bundled models have laws of their own
SOURCE = ROOT / "src" / "assay"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_STOPS = 7
MOST_NAMES = 2  # of one value
ROW = re.compile(r"^\| (\d+) \| `(.+?)` \| `(.+?)` \| (.+?) \| `(.+?)` \|$", re.MULTILINE)
WALKS = {
    "nonce": "A nonce, from `prove` to its record",
    "callback": "A nonce, from a callback to the ledger",
    "receipt": "A receipt, from its file to the ledger",
    "pair": "A pair, to a flagged rollout",
    "setting": "A setting, from the command line to the weights",
    "model": "A model, from its reference to an engine",
}
MODEL = "reference:qwen3"


class Stop(NamedTuple):
    """A row of a walk's table."""

    number: int
    file: str
    function: str
    value: str
    name: str


class Entry(NamedTuple):
    """A function of assay that was entered."""

    file: str
    function: str


def section(title: str) -> str:
    """The text below a heading of the page, up to the next heading."""
    _, _, text = PAGE.partition(f"\n### {title}\n")
    return re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]


def stops_of(walk: str) -> list[Stop]:
    rows = ROW.findall(section(WALKS[walk]))
    return [Stop(int(number), *cells) for number, *cells in rows]


@cache
def floors() -> dict[str, list[str]]:
    """The layers of every container, from the top, as import-linter reads them."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = table["tool"]["importlinter"]["contracts"]
    return {contract["containers"][0]: contract["layers"] for contract in contracts}


def drawing() -> dict[str, list[tuple[str, str]]]:
    """The floors that are drawn, by container: the names, and what stands beside them."""
    _, _, text = PAGE.partition("\n```\n")
    container = "assay"
    drawn: dict[str, list[tuple[str, str]]] = {container: []}
    for line in text.partition("\n```\n")[0].splitlines():
        if line.endswith(":"):
            container = "assay." + line.partition(",")[0]
            drawn[container] = []
        elif line:
            names, _, words = line.strip().partition("  ")
            drawn[container].append((names, words.strip()))
    return drawn


def package_of(file: str) -> str:
    """The name of the drawing that a file belongs to, as a path."""
    parts = file.removesuffix(".py").split("/")
    containers = [name for name in floors() if name.split(".")[1:] == parts[:1]]
    if not containers:
        return parts[0]
    names = [name for layer in floors()[containers[0]] for name in layer.split(" | ")]
    inside = ".".join(parts[1:])
    (name,) = (name for name in names if f"{inside}.".startswith(f"{name}."))
    return f"{parts[0]}/{name.replace('.', '/')}"


def entered_twice(files: Sequence[str]) -> set[str]:
    """The packages to which a walk returns."""
    packages = [package_of(file) for file in files]
    changes = [
        package
        for index, package in enumerate(packages)
        if index == 0 or package != packages[index - 1]
    ]
    return {package for package in changes if changes.count(package) > 1}


def definition(file: str, function: str) -> ast.AST:
    """The function of a stop; an error where the file or the function is not there."""
    node: ast.AST = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    for name in function.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        body = getattr(node, "body", [])
        (node,) = (child for child in body if isinstance(child, kinds) and child.name == name)
    return node


def names_in(function: ast.AST) -> set[str]:
    """The variables, parameters and attributes that a function uses."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return names


@contextmanager
def recorded() -> Iterator[list[Entry]]:
    """Record the functions of assay that are entered, in this thread and in those it starts."""
    entries: list[Entry] = []
    before = sys.getprofile()
    prefix = f"{Path(assay.__file__).parent}/"

    def note(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix):
            entries.append(Entry(code.co_filename.removeprefix(prefix), code.co_qualname))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield entries
    finally:
        sys.setprofile(before)
        threading.setprofile(before)


def first_missing(stops: Sequence[Stop], entries: Sequence[Entry]) -> Stop | None:
    """The first stop that is not entered after the ones before it; None if all are."""
    later = iter(entries)
    for stop in stops:
        if Entry(stop.file, stop.function) not in later:  # which takes entries up to that one
            return stop
    return None


def check_walk(walk: str, entries: Sequence[Entry]) -> None:
    missing = first_missing(stops_of(walk), entries)
    assert missing is None, f"{walk}: {missing} is not entered after the stops before it"


def test_the_drawing_has_the_floors_of_the_contracts():
    drawn = {container: [names for names, _ in lines] for container, lines in drawing().items()}
    assert drawn == floors()


def test_the_drawing_names_every_package():
    text = "\n".join(" ".join(line) for lines in drawing().values() for line in lines)
    words = set(re.findall(r"\w+", text))
    packages = {path.parent.name for path in SOURCE.glob("*/**/__init__.py")}
    packages -= {"directions"}  # whose four packages are drawn
    assert packages <= words
    assert all(words for lines in drawing().values() for _, words in lines)


def test_the_page_has_no_other_walk():
    titles = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    assert titles == list(WALKS.values())
    assert len(ROW.findall(PAGE)) == len(re.findall(r"^\| \d", PAGE, re.MULTILINE))


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_has_few_stops_and_each_is_defined(walk):
    stops = stops_of(walk)
    assert [stop.number for stop in stops] == list(range(1, len(stops) + 1))
    assert 2 <= len(stops) <= MOST_STOPS
    for stop in stops:
        assert stop.name in names_in(definition(stop.file, stop.function)), stop


@pytest.mark.parametrize("walk", WALKS)
def test_a_value_has_at_most_two_names(walk):
    names: dict[str, set[str]] = {}
    for stop in stops_of(walk):
        names.setdefault(stop.value, set()).add(stop.name)
    assert all(len(of_value) <= MOST_NAMES for of_value in names.values()), names


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_enters_no_package_twice(walk):
    assert entered_twice([stop.file for stop in stops_of(walk)]) == set()


@pytest.mark.parametrize(
    ("files", "packages"),
    [
        (["cli/poc.py", "settings.py", "cli/vhack.py"], {"cli"}),
        (["poc/prover.py", "poc/engines/base.py", "poc/engines/hf/engine.py"], set()),
        (["vhack/directions/basis/axes.py", "vhack/directions/gradients/svd.py"], set()),
    ],
)
def test_what_counts_as_entering_a_package_twice(files, packages):
    assert entered_twice(files) == packages


def test_stops_in_another_order_are_refused():
    stops = stops_of("model")
    entries = [Entry(stop.file, stop.function) for stop in stops]
    assert first_missing(stops, entries) is None
    assert first_missing(stops[::-1], entries) == stops[-2]
    assert first_missing(stops, entries[:-1]) == stops[-1]


@pytest.fixture(scope="module")
def model():
    from assay.models import load_model

    return load_model(MODEL, dtype="float32", device="cpu")


def test_the_walk_of_a_nonce(model):
    from assay.poc import Round, prove

    round = Round(block_hash="block", public_key="key", seq_len=8)
    with recorded() as entries:
        prove(model, round, round.nonces(0, 2), batch_size=2)
    check_walk("nonce", entries)


def test_the_walk_of_a_callback(model, tmp_path: Path):
    (tmp_path / "pins.toml").write_text(pins_text(model))
    (tmp_path / "nodes.toml").write_text(nodes_text())
    body = body_of(proof_of(model, "node_A", range(BATCH)))
    with recorded() as entries:
        running = Running(model, tmp_path, {"nonces_per_hour": 10_000_000}, {})
        try:
            running.announce()
            running.wait_ready()
            running.send(body)
            until(lambda: running.node("node_A")["checked"] > 0)
        finally:
            running.close()
    check_walk("callback", entries)


def test_the_walk_of_a_receipt(model, tmp_path: Path):
    from assay.poc.audit import Auditor
    from assay.poc.protocol.pins import Pins
    from assay.poc.responses import read_requests, respond

    requests = tmp_path / "requests.jsonl"
    line = {"prompt": [5, 9, 12, 40], "request_id": "r", "max_tokens": 8}
    requests.write_text(json.dumps(line) + "\n")
    receipts = tmp_path / "receipts.jsonl"
    known = {"block_hash": "block", "public_key": "key"}
    respond(model, read_requests(requests), **known, end_tokens=(), output=receipts)
    auditor = Auditor(model=MODEL, device="cpu", ledger=tmp_path / "ledger.sqlite3")
    with recorded() as entries:
        auditor.audit_receipts(receipts, given=Pins(**known), requests=requests)
    check_walk("receipt", entries)


def pay(completions, **_) -> list[float]:
    """A reward function of TRL, for groups of two."""
    return [1.0, 0.0]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_walk_of_a_pair(checkpoint: Path, pairs: list, tmp_path: Path):  # noqa: F811
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from assay.models import load_model
    from assay.vhack.detectors import fit_judge
    from assay.vhack.pairs import read_pairs, write_pairs
    from assay.vhack.training import Guard

    write_pairs(tmp_path / "pairs.jsonl", pairs)
    tiny = load_model(checkpoint, dtype="float32", device="cpu")
    config = GRPOConfig(
        str(tmp_path / "run"), max_steps=1, num_generations=2, per_device_train_batch_size=2,
        max_completion_length=4, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        seed=1, reward_weights=[1.0], disable_tqdm=True,
    )  # fmt: skip
    with recorded() as entries:
        judge = fit_judge(read_pairs(tmp_path / "pairs.jsonl"), tiny, promised=0.5)
        trainer = GRPOTrainer(
            model=tiny.module,
            reward_funcs=[pay],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["abc", "de"]}),
            processing_class=tiny.tokenizer,
        )
        guard = Guard(judge).attach(trainer)
        trainer.train()
    assert len(guard.flags) == 2
    check_walk("pair", entries)


def test_the_walk_of_a_setting(tmp_path: Path):
    from assay.cli import run

    known = ["--block-hash", "block", "--public-key", "key", "--nonces", "0:2", "--seq-len", "8"]
    output = ["-o", str(tmp_path / "proof.jsonl")]
    with recorded() as entries:
        chosen = ["--model", MODEL, "--device", "cpu", "--dtype", "float32"]
        code = run(["poc", "prove", *chosen, *known, *output])
    assert code == 0
    check_walk("setting", entries)


def test_the_walk_of_a_model():
    from assay.models import load_model
    from assay.poc.engines.hf.engine import HFEngine

    with recorded() as entries:
        HFEngine(load_model(MODEL, device="cpu"), batch_size=2, seq_len=8)
    check_walk("model", entries)
