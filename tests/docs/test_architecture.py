"""The two walks of docs/architecture.md are the ways that a nonce and a pair really take."""

import re
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import assay
from assay.poc import Round, prove, verify
from assay.vhack import extract
from assay.vhack.pairs import generate_pairs
from tests.test_structure import MODULES

SOURCES = Path(assay.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
SECTIONS = PAGE.read_text(encoding="utf-8").split("\n## ")


def steps(title: str) -> list[tuple[str, str]]:
    """The (file, function) rows of a section's table."""
    (section,) = (text for text in SECTIONS if text.startswith(title))
    return re.findall(r"^\| \d+ \|[^|]*\| `([^`]+)` \| `([^`]+)` \|$", section, flags=re.MULTILINE)


def steps_taken(walk: list[tuple[str, str]], work) -> int:
    """How many steps of a walk are taken in its order: a step is taken when its function returns or yields."""
    taken = 0

    def watch(frame, event, argument):
        nonlocal taken
        if event == "return" and taken < len(walk):
            file, function = walk[taken]
            taken += frame.f_code.co_name == function and frame.f_code.co_filename == str(SOURCES / file)

    sys.setprofile(watch)
    threading.setprofile(watch)  # torch may run backward passes in threads of its own
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return taken


def nonce_walk(model):
    round = Round(block_hash="b", public_key="k", seq_len=16, model=model.reference)
    verify(prove(model, round, [7], batch_size=1), model, expect=round)


def pair_walk(model):
    extract(generate_pairs(3), model, n_heldout=1, method="svd", top_k=1)


@pytest.mark.parametrize(
    ("title", "work", "most"), [("The way of a nonce", nonce_walk, 10), ("The way of a pair", pair_walk, 12)]
)
def test_a_walk_is_the_way_that_is_taken(title, work, most):
    walk = steps(title)
    assert 8 <= len(walk) <= most
    assert max(Counter(file for file, _ in walk).values()) <= 2
    model = assay.load_model("reference:qwen3", dtype="float32", device="cpu")
    assert walk[steps_taken(walk, lambda: work(model)) :] == []


def test_the_drawing_has_every_room():
    drawing = SECTIONS[0]
    for name in MODULES:
        parts = name.split(".")
        if len(parts) == 3 and parts[1] in ("poc", "vhack") and not parts[2].startswith("_"):
            assert parts[2] in drawing, name
