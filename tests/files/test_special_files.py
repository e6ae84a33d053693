"""Pipes in the place of files: refused where a file is wanted, for opening one waits for ever."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from assay.files.sqlite import Database

REFERENCE = Path(__file__).parents[2] / "src" / "assay" / "models" / "reference" / "qwen3"
MODEL_FILES = (
    "model.gguf",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
READ = """
import signal, sys
from pathlib import Path
from assay import load_model
from assay.errors import AssayError
from assay.poc.responses.receipts import digest_adapter
for folder in sorted(Path(sys.argv[1]).iterdir()):
    signal.alarm(60)  # ends this process where one waits
    try:
        digest_adapter(folder) if "adapter" in folder.name else load_model(folder, device="cpu")
    except AssayError:
        pass
    print(folder.name)
"""
OPEN = """
import signal, sys
from pathlib import Path
from assay.errors import StorageError
from assay.files.sqlite import Database
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for read_only in (True, False):
        signal.alarm(20)  # ends this process where one waits
        try:
            Database(folder, name="d.sqlite3", migrations=((),), read_only=read_only)
        except StorageError:
            print(folder.name, read_only)
"""


def run_code(code: str, folder: Path) -> list[str]:
    """Return the lines that a program prints about the folders in a folder."""
    command = [sys.executable, "-c", code, str(folder)]
    ended = subprocess.run(command, capture_output=True, timeout=250, text=True, check=False)
    assert ended.returncode == 0, (ended.returncode, ended.stdout, ended.stderr)
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_a_pipe_in_a_folder_of_a_model_makes_nobody_wait(tmp_path: Path):
    """It is refused, or left out like a file that is not there."""
    folder = tmp_path / "folders" / "beside adaption"
    shutil.copytree(REFERENCE, folder)
    os.mkfifo(folder / "adapter_config.json")
    for name in (*MODEL_FILES, *ADAPTER_FILES):
        folder = tmp_path / "folders" / name
        shutil.copytree(REFERENCE, folder)
        if name in ADAPTER_FILES:
            (folder / "adapter_config.json").write_text("{}")
            shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
        if name.endswith(".gguf"):
            (folder / "model.safetensors").unlink()
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    read = run_code(READ, tmp_path / "folders")
    assert read == sorted(path.name for path in (tmp_path / "folders").iterdir())


def test_a_pipe_in_the_place_of_a_database_or_its_journal_is_refused(tmp_path: Path):
    wanted = []
    for end in ("", "-wal", "-journal", "-shm"):
        for link in (False, True):
            folder = tmp_path / "folders" / f"{link} {end}"
            place = folder / "elsewhere" if link else folder
            Database(place, name="d.sqlite3", migrations=((),)).close()
            if link:
                (folder / "d.sqlite3").symlink_to(place / "d.sqlite3")
            (place / f"d.sqlite3{end}").unlink(missing_ok=True)
            os.mkfifo(place / f"d.sqlite3{end}")
            wanted += [f"{folder.name} {read_only}" for read_only in (True, False)]
    assert sorted(run_code(OPEN, tmp_path / "folders")) == sorted(wanted)
