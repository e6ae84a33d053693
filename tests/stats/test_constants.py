"""Each constant of the statistics stands in one place."""

import ast
from collections import Counter
from pathlib import Path

import assay.stats


def test_no_constant_is_defined_in_two_files():
    """Two definitions of one name agree until one of them is changed, or never did."""
    files = sorted(Path(assay.stats.__file__).parent.glob("*.py"))
    found: Counter[str] = Counter()
    for file in files:
        for line in ast.parse(file.read_text()).body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            found.update({target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()})
    found.pop("__all__", None)
    assert found["NAMED_WEIGHT"] == 1
    assert [name for name, count in found.items() if count > 1] == []
