"""What benchmarks share: the checkout on the path, turns and clocks, and a JSON file that says
where it comes from.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from scipy.stats import binom

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for helpers of the tests: servers, receivers, checkpoints


def parser(description: str) -> argparse.ArgumentParser:
    """Return an argument parser with the option that all benchmarks share."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("-o", "--output", type=Path, help="write the result there as JSON")
    return options


def publish(name: str, figures: dict[str, object], output: Path | None) -> None:
    """Print the figures with where they come from, and write them if asked."""
    # Here, because a worker of two_commits has an older assay on its path.
    from assay.files.storage import write_atomic
    from assay.pages.provenance import provenance

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


def round_to(value, digits=5):
    """Return a number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def paired_ratios(olds, news):
    """Return the new over the old of every two turns one after the other, which have both orders.

    What runs first in a turn can be 5 % slower. Of an odd number the last turn is left out.
    """
    ratios = [new / old for old, new in zip(olds, news, strict=True)]
    return [math.sqrt(even * odd) for even, odd in zip(ratios[::2], ratios[1::2], strict=False)]


def median_interval(ratios):
    """Return the median of ratios, and the ends of its 95 % interval by ranks."""
    ordered = sorted(ratios)
    rank = int(binom.ppf(0.025, len(ordered), 0.5))
    ends = [ordered[max(0, rank - 1)], ordered[min(len(ordered) - 1, len(ordered) - rank)]]
    return [round_to(statistics.median(ordered), 4), *(round_to(ratio, 4) for ratio in ends)]


def timed(function, clock=time.perf_counter):
    """Return the seconds of one call and its result, and wait for a GPU before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


def wall_seconds(function):
    """Return the seconds of one call."""
    return timed(function)[0]


def event_seconds(function, repeats=1):
    """Return the seconds of one call on the GPU, the mean of some calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def take_turns(timed, rounds):
    """Return the median seconds of each of several functions that measure themselves, in turns."""
    times = {name: [] for name in timed}
    for _ in range(rounds):
        for name, measure in timed.items():
            times[name].append(measure())
    return {name: statistics.median(values) for name, values in times.items()}


def save_small_checkpoint(path):
    """Write the checkpoint of the tests: 0.2 M random parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from conftest import SMALL

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(path)
