"""Every test that SECURITY.md names exists, and every defence has one."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`((?:research/)?tests/[\w/]+\.py)::(\w+)`", PAGE)


@cache
def functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str):
    assert name.startswith("test_")
    assert name in functions(path)


def test_every_defence_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| attacker")]
    assert len(rows) > 20
    assert [row for row in rows if "`tests/" not in row] == []
    assert len(NAMED) >= 40
