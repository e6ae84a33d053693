"""Grade programs that are made to break their grader: none may end a step with an exception.

    python benchmarks/vhack_hostile.py --count 10000 -o benchmarks/results/vhack_hostile.json

A third are fragments of programs in any order, a third exploits with a line that a reader of syntax trees cannot bear,
a third write a forged report of any shape (`tests/vhack/environment/hostile.py`).
"""

import collections
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import note, parser, publish

from assay.vhack.environment import Limits, grade_many
from assay.vhack.environment.sandbox import available_backend
from tests.vhack.environment.hostile import program

CHUNK = 500


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--first", type=int, default=1000, help="first seed; the tests use those below 240")
    given = arguments.parse_args()
    found, ended = collections.Counter(), collections.Counter()
    for begin in range(given.first, given.first + given.count, CHUNK):
        seeds = range(begin, min(begin + CHUNK, given.first + given.count))
        for grade in grade_many([program(seed) for seed in seeds], limits=Limits(seconds=2.0)):
            names = ("correct", "accepted", "vacuous", "paid", "exploited")
            found.update({name: int(getattr(grade, name)) for name in names})
            ended[grade.fault or grade.result.raised or ("timed out" if grade.result.timed_out else "")] += 1
            found["faults"] += bool(grade.fault)
        note(f"{seeds.stop - given.first} of {given.count}: {dict(found)}")
    figures = {"programs": given.count, "first_seed": given.first, "backend": available_backend(), **found}
    figures |= {"ended_with": dict(ended.most_common()), "load_after": os.getloadavg()[0]}
    publish("vhack_hostile", figures, given.output)


if __name__ == "__main__":
    main()
