"""Every reader of files under atheris: files that reach each line of it are read, or refused by an
error of assay.

``make redteam`` installs atheris, which assay does not need, and runs it.

    python research/benchmarks/atheris_readers.py FOLDER --seconds 60

FOLDER has a whole file of every kind, as ``redteam_surface.samples`` writes them. A line of JSON
for each reader says with what its process ended: 0, or else libFuzzer names the file that was
neither read nor refused.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["assay"]):
    from redteam_surface import readers

    from assay.errors import AssayError


def follow(name: str, read: Callable[[Path], object], whole: Path, seconds: int) -> None:
    """Change the file of a reader for so many seconds; this ends the process."""
    folder = Path(tempfile.mkdtemp(prefix="atheris-"))
    (seeds := folder / "seeds").mkdir()
    shutil.copy(whole / name, seeds)
    for file in whole.iterdir():  # a reader may look at what lies beside its file
        if file.is_file():
            shutil.copy(file, folder)

    def one(content: bytes) -> None:
        (folder / name).write_bytes(content)
        try:
            read(folder / name)
        except AssayError:
            return

    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=20", "-max_len=65536"]
    atheris.Setup(
        [sys.argv[0], *limits, f"-artifact_prefix={folder}/", "-print_final_stats=1", str(seeds)],
        one,
    )
    atheris.Fuzz()


def main():
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--seconds", type=int, default=60, help="for each reader")
    chosen = options.parse_args()
    for name, read in readers(chosen.folder).items():
        if not (child := os.fork()):
            follow(name, read, chosen.folder, chosen.seconds)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(
            json.dumps({"attack": f"atheris over {name}", "ended": ended, "held": ended == 0}),
            flush=True,
        )


if __name__ == "__main__":
    main()
