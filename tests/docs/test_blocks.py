"""Blocks of the pages that a new user follows run in the order in which they are met, and print
what is shown.

`make release-check` runs them in a fresh checkout, with the lines that make or install something,
left out here.
"""

import re
import subprocess

import pytest

from tests.docs.shell import PAGES, ROOT, held, page_blocks, run, script
from tests.end_to_end.server import free_port

INSTALLS = (
    "make ",
    "pip ",
    "python3 -m venv",
)  # in a checkout of symbolic links they would change the real one


@pytest.fixture
def checkout(tmp_path):
    """A folder with everything of the checkout, in which commands write without touching it."""
    listed = ["git", "ls-tree", "--name-only", "HEAD"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in (*names.split(), ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.needs("curl", "git")
@pytest.mark.skipif(
    not (ROOT / ".venv/.ready").exists(), reason="runs in the environment of `make setup`"
)
def test_the_readme(checkout):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = page_blocks.script(readme, leave_out=INSTALLS)
    for name, known in (("validator", 8090), ("serve", 8100)):
        port = free_port()
        text = text.replace(f"127.0.0.1:{known}", f"127.0.0.1:{port}")
        text = text.replace(f"assay poc {name}", f"assay poc {name} --port {port}")
    done = run(text, checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("fraud") == 1  # of the program, as its comment says
    (shown,) = re.findall(r"^```text\n(Honest: .*\n)```$", readme, re.MULTILINE)
    assert shown in done.stdout
    assert '"verdict":"honest"' in done.stdout  # of the validator
    (served,) = re.findall(r"^```console\npip .*\n((?s:.*?))^```$", readme, re.MULTILINE)
    assert served in (ROOT / "docs/vllm.md").read_text(encoding="utf-8"), (
        "tests/vllm runs the command of that page"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.needs("curl")
@pytest.mark.usefixtures("warm")
def test_the_tutorial(tmp_path):
    assert "honest" in held(script("tutorial"), tmp_path)


def test_a_block_that_fails_ends_the_run(tmp_path):
    text = (
        "```python\n# mine.py\nx = 1\n```\n```python\nimport "
        "mine\n```\n```python\nprint(mine.x)\n```\n"
    )
    done = run(
        page_blocks.script(text + "```sh\na=2\n```\ntext\n```sh\necho $a\nfalse\necho 3\n```\n"),
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "1\n2\n")
    assert run(page_blocks.script("```python\n1 / 0\n```\n"), tmp_path).returncode == 1
    left_out = "```sh\nmake it \\\n  || false\n```\n```python\nit = 1 / 0\nassert it\n```\n"
    assert (
        run(page_blocks.script(left_out, leave_out=("make it", "it =")), tmp_path).returncode == 0
    )


def test_links_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *PAGES.values()):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
