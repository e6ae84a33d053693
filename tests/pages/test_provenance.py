import getpass
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from assay.files.jsonl import dumps
from assay.pages.provenance import checkout, provenance


def test_it_is_json_without_names_of_hosts_users_or_paths():
    text = dumps(provenance())
    home = os.path.expanduser("~")  # noqa: PTH111 - that of Path fails for a user without an entry
    assert home not in text or home in ("/", "~")
    assert str(Path(__file__).parents[2]) not in text
    assert f'"{platform.node()}"' not in text
    with suppress(KeyError):  # a user without an entry
        assert f'"{getpass.getuser()}"' not in text


@pytest.mark.needs("git")
def test_a_file_unknown_to_git_has_no_commit(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "module.py").touch()
    assert checkout(tmp_path / "module.py") == {"commit": None, "dirty": None}


@pytest.mark.needs("git")
def test_commit_and_local_changes_are_stated(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )

    (tmp_path / "module.py").write_text("one")
    git("init", "-q")
    git("add", "module.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert checkout(tmp_path / "module.py") == {"commit": commit, "dirty": False}
    (tmp_path / "module.py").write_text("two")
    assert checkout(tmp_path / "module.py") == {"commit": commit, "dirty": True}


def test_neither_torch_nor_matplotlib_is_imported():
    code = (
        "import sys; from assay.pages.provenance import provenance; provenance();"
        "print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "[]\n"
