"""The parts of an experiment as processes side by side, over all GPUs.

    python benchmarks/vhack_study_many.py pilot --organism ORGANISM -o DIR --devices 8 --seconds 140

Each part is a call of ``vhack_study.py``; what the parts are is said below, everything else is passed on to all of
them. Logs come to ``DIR/logs/PART``, what the parts say to ``DIR/PART.txt``.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

SLOW = ("--adam-rate", "0.015", "--sgd-rate", "0.35")
RATES = ("--adam-rate", "0.03", "--sgd-rate", "0.7")


def _of(plan, difficulty, rates=RATES, *more):
    return ("--plan", plan, "--difficulty", difficulty, *rates, *more)


PARTS = {
    "pilot": (
        *(_of("plain", difficulty) for difficulty in ("1,3", "2,3", "2,4", "3,4")),
        *(_of("plain", difficulty, SLOW) for difficulty in ("1,3", "2,3", "2,4")),
        *(_of(plan, difficulty) for difficulty in ("2,3", "2,4") for plan in ("bounds", "displaced", "others")),
        *(_of(plan, "1,3") for plan in ("bounds", "displaced")),
        _of("bounds", "2,4", SLOW),
    ),
    "candidates": tuple(_of("candidates", "2,4", SLOW, "--part", f"{i}/3") for i in range(3)),
    # All runs begin as the same model, so one part tells how that does.
    "second": tuple(_of("second", "2,4", SLOW, "--part", f"{i}/12", *(() if i else ("--start",))) for i in range(12)),
}
"""Arguments of each part."""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", choices=PARTS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=0, help="GPUs to spread over; 0 leaves it to the environment")
    given, rest = parser.parse_known_args()
    given.output.mkdir(parents=True, exist_ok=True)
    study = Path(__file__).with_name("vhack_study.py")
    running = []
    for index, part in enumerate(PARTS[given.experiment]):
        environment = dict(os.environ)
        if given.devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(index % given.devices)
        folders = ("--state", given.output / "state" / str(index), "--logs", given.output / "logs" / str(index))
        said = (given.output / f"{index}.txt").open("w")
        command = [sys.executable, str(study), *part, *map(str, folders), *rest]
        running.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in running]
    print(codes)
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
