"""Blocks of the pages that a new user follows run in the order in which they are met, and print what is shown.

`make release-check` runs them in a fresh checkout, with the lines that make or install something, left out here.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.shell import ROOT, ROW, held, not_run, page, page_blocks, run, script
from tests.end_to_end.server import free_port

FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = (
    *("assay", "pip", r"python3?[\d.]*", "torchrun", "make", "pytest", "vllm", r"\S+/bin/\w+"),
    *("curl", "cd", "install", "useradd", "systemctl", "sudo", "sqlite3", "amtool"),
)
COMMAND = re.compile(rf"^(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) ", re.MULTILINE)
RUN = {
    "tests/docs/test_blocks.py": ("tutorial",),
    "tests/docs/test_quickstart.py": ("vhack-quickstart",),
    "tests/docs/test_calibration_page.py": ("calibration",),
    "tests/docs/test_command_lines.py": ("networks",),
    "tests/docs/test_pages_for_operators.py": (
        *("node", "service", "operations", "validator", "pins", "ledger"),
        *("protocol", "responses", "decode", "streams", "models"),
    ),
    "tests/docs/test_pages_for_researchers.py": (
        "statistics",
        "vhack",
        "vhack-pairs",
        "vhack-checks",
        "vhack-training",
    ),
    "tests/docs/test_pages_of_results.py": (*("experiments", "redteam", "redteam-responses", "gpu", "vllm"),),
}
"""Pages whose blocks run, by the test that runs all of them but the lines of docs/blocks.md."""
OWN_WAY = ("vhack-quickstart", "calibration")
"""Pages that a test runs in its own way: the whole page, or as many blocks as it names."""
INSTALLS = ("make ", "pip ", "python3 -m venv")  # in a checkout of symbolic links they would change the real one


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with everything of the checkout, in which commands write without touching it."""
    listed = ["git", "ls-tree", "--name-only", "HEAD"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in (*names.split(), ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (ROOT / ".venv/.ready").exists(), reason="runs in the environment of `make setup`")
def test_the_readme(checkout: Path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    port = free_port()
    text = page_blocks.script(readme, leave_out=INSTALLS).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    done = run(text, checkout, ASSAY_PORT=str(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("honest") == 1  # of the program, as its comment says
    assert '"status":"OK"' in done.stdout  # of the request to the service
    for name in ("data/service.sqlite3", "hack.safetensors"):
        assert (checkout / name).is_file(), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("warm")
def test_the_tutorial(tmp_path: Path):
    assert "honest" in held(script("tutorial"), tmp_path)


def test_every_page_with_blocks_is_run():
    with_blocks = {
        path.stem
        for path in (ROOT / "docs").rglob("*.md")
        for kind, _ in FENCED.findall(path.read_text(encoding="utf-8"))
        if kind in ("sh", "python")
    }
    assert with_blocks == {name for names in RUN.values() for name in names}
    for test, names in RUN.items():
        text = (ROOT / test).read_text(encoding="utf-8")
        for name in names:
            assert f'{name}.md"' in text if name in OWN_WAY else f'script("{name}"' in text, name


def test_blocks_say_what_they_are():
    """A block of commands without ``sh`` would not run."""
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for kind, body in FENCED.findall(path.read_text(encoding="utf-8")):
            assert kind in ("", "sh", "python", "toml", "json", "sql"), f"{path.name}: {kind}"
            if not kind:
                assert not COMMAND.search(body), f"{path.name}: {body}"


def test_every_line_that_does_not_run_is_on_its_page_and_has_a_reason():
    assert sum(line.startswith("| [") for line in page("blocks").splitlines()) == len(ROW.findall(page("blocks")))
    for name, lines in not_run().items():
        assert name not in OWN_WAY
        bodies = [body for kind, body in FENCED.findall(page(name)) if kind in ("sh", "python")]
        starts = [line for body in bodies for line in page_blocks.LINE.findall(body)]
        for begins, (why, instead) in lines.items():
            assert any(line.startswith(begins) for line in starts), f"{name}: {begins}"
            assert why.strip()
            assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/.]+", instead)), instead


def test_only_listed_lines_are_left_out():
    for name in (name for names in RUN.values() for name in names if name not in OWN_WAY):
        whole = page_blocks.script(page(name)).splitlines()
        kept = page_blocks.script(page(name), leave_out=tuple(not_run().get(name, ()))).splitlines()
        assert bool(set(whole) - set(kept)) == (name in not_run())
        assert len(kept) > len(page_blocks.HEAD.splitlines()), f"{name}: nothing runs"


def test_a_block_that_fails_ends_the_run(tmp_path: Path):
    text = "```python\n# mine.py\nx = 1\n```\n```python\nimport mine\n```\n```python\nprint(mine.x)\n```\n"
    done = run(page_blocks.script(text + "```sh\na=2\n```\ntext\n```sh\necho $a\nfalse\necho 3\n```\n"), tmp_path)
    assert (done.returncode, done.stdout) == (1, "1\n2\n")
    assert run(page_blocks.script("```python\n1 / 0\n```\n"), tmp_path).returncode == 1
    left_out = "```sh\nmake it \\\n  || false\n```\n```python\nit = 1 / 0\nassert it\n```\n"
    assert run(page_blocks.script(left_out, leave_out=("make it", "it =")), tmp_path).returncode == 0


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
