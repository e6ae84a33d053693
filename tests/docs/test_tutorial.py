"""The tutorial runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["docs/tutorial.md", "README.md"])
def test_every_python_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # some blocks write files
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": page}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_the_readme_shows_what_its_example_prints(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block[1], "README.md", "exec"), {"__name__": "README.md"})
    printed = capsys.readouterr().out.strip()
    assert printed
    assert printed in page


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
