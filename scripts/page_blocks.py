"""Run the blocks of a page in the order in which a reader meets them: ``python
scripts/page_blocks.py README.md``.

They run in the current directory. Blocks of ``sh`` share one shell, and neighbouring blocks of
``python`` one interpreter; a ``python`` block that begins with ``# name.py`` is the file of that
name. Other blocks are output.
"""

import re
import subprocess
import sys
from collections.abc import Collection
from itertools import groupby
from pathlib import Path

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.py)\n")
LINE = re.compile(r"(?:.*\\\n)*.*\n")
"""A line of ``sh`` with those that continue it."""
CHECK = re.compile(r"^(assay vhack (?:check|pools) .*)$", re.MULTILINE)
"""Commands whose exit codes 1 and 2 are verdicts, after which a reader goes on."""
HEAD = """\
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
"""


def script(text: str, *, leave_out: Collection[str] = ()) -> str:
    """Return the blocks of a page as one script of bash.

    Args:
        text: Page in Markdown.
        leave_out: Beginnings of lines of ``sh``, continued ones included, and of blocks of
            ``python`` that do not run.
    """
    out = tuple(leave_out)
    kinds = (
        (FILE.match(body)[1] if FILE.match(body) else language, body)
        for language, body in BLOCK.findall(text)
    )
    kept = ((kind, body) for kind, body in kinds if kind == "sh" or not body.startswith(out))
    parts = [HEAD]
    for kind, group in groupby(kept, key=lambda block: block[0]):
        body = "".join(body for _, body in group)
        if kind == "sh":
            lines = (line for line in LINE.findall(body) if not line.startswith(out))
            parts.append(CHECK.sub(r"\1 || test $? -le 2", "".join(lines)))
        else:
            reader = "python -" if kind == "python" else f"cat > {kind}"
            parts.append(f"{reader} <<'END_OF_BLOCK'\n{body}END_OF_BLOCK\n")
    return "".join(parts)


def main() -> int:
    """Run the blocks of the page that is named; further arguments are lines to leave out."""
    page, *leave_out = sys.argv[1:]
    text = script(Path(page).read_text(encoding="utf-8"), leave_out=leave_out)
    return subprocess.run(["bash", "-c", text], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
