"""What SECURITY.md says is tested has a test of that name."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_is_there():
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text()))
    assert len(named) > 60
    assert not {
        (file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()
    }
