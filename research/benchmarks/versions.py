"""Two checkouts of assay through the same benchmarks, in turns, in one run on one machine.

Each benchmark of :data:`FIGURES` runs in both checkouts, ``--turns`` times each in alternating order. Every run is a
process of its own with the benchmark script of that checkout. The ratio of a figure is the median of this checkout over
the median of the other one; for times it is inverted, so that a ratio above 1 always means faster.

    python benchmarks/versions.py --before ../first --run gpu_prove.py --model shape:qwen3-0.6b
    python benchmarks/versions.py --before ../first --run vhack_gradients.py --run prove_overhead.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import note, parser, publish

from assay.reports import read_json

HERE = Path(__file__).resolve().parents[1]
FIGURES = {
    "gpu_prove.py": ("nonces_per_second.prove", "nonces_per_second.serial", "nonces_per_second.last"),
    "gpu_normals.py": ("shapes.*.triton_ms",),
    "vhack_gradients.py": ("models.*.batched_seconds",),
    "prove_overhead.py": ("cases.*.prove_over_bare",),
}
"""Benchmark → paths of its figures in its result; ``*`` stands for every entry. On a shared CPU the speed of `prove`
itself says little: its ratio to the bare forward pass of transformers, in turns with it, is compared."""
TIMES = ("_ms", "_seconds")


def leaves(values: Any, path: list[str], name: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, figure) of everything that a path leads to; of repeated times the shortest."""
    if path and path[0] == "*":
        for key, value in enumerate(values) if isinstance(values, list) else values.items():
            yield from leaves(value, path[1:], f"{name}.{key}")
    elif path:
        yield from leaves(values[path[0]], path[1:], f"{name}.{path[0]}" if name else path[0])
    else:
        yield name, min(values) if isinstance(values, list) else float(values)


def run(checkout: Path, script: str, options: list[str]) -> dict[str, float]:
    """Return the figures of a benchmark in a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(checkout / "benchmarks" / script), *options, "-o", str(result)]
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        measured = read_json(result)
    return dict(pair for path in FIGURES[script] for pair in leaves(measured, path.split(".")))


def compare(before: Path, script: str, options: list[str], turns: int) -> dict[str, Any]:
    """Run a benchmark in both checkouts by turns and return medians and ratios per figure."""
    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    order = [("before", before), ("after", HERE)]
    for turn in range(turns):
        for label, checkout in order[:: 1 if turn % 2 == 0 else -1]:
            note(f"{script}, turn {turn + 1}, {label}")
            found[label].append(run(checkout, script, options))
    figures = {}
    for name in found["before"][0]:
        old, new = (statistics.median(turn[name] for turn in found[label]) for label in ("before", "after"))
        ratio = old / new if name.endswith(TIMES) else new / old
        figures[name] = {"before": old, "after": new, "speed_over_before": round(ratio, 4)}
    return {"options": options, "turns": turns, "figures": figures}


def main() -> None:
    """Compare the benchmarks named by ``--run``; options that are not known here go to each of them."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--before", type=Path, required=True, help="the other checkout")
    arguments.add_argument("--run", action="append", choices=FIGURES, required=True, help="a benchmark; repeatable")
    arguments.add_argument("--turns", type=int, default=2)
    given, options = arguments.parse_known_args()
    compared = {script: compare(given.before.resolve(), script, options, given.turns) for script in given.run}
    slowest = min(row["speed_over_before"] for one in compared.values() for row in one["figures"].values())
    publish("versions", {"benchmarks": compared, "smallest_speed_over_before": slowest}, given.output)


if __name__ == "__main__":
    main()
