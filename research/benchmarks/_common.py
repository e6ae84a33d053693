"""What every benchmark does with its figures: date, command, commit, machine, one JSON file."""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from assay.files.storage import write_atomic
from assay.pages.provenance import provenance


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the option that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-o", "--output", type=Path, help="write the result there as JSON")
    return made


def publish(name: str, figures: dict[str, object], output: Path | None) -> None:
    """Print the figures with where they come from, and write them if asked."""
    result = {
        "schema": f"assay.benchmark.{name}/1",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + shlex.join(sys.argv),
        **provenance(),
        **figures,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, text + "\n")


def note(text: str) -> None:
    """Say on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)
