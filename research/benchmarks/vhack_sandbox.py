"""How fast the sandbox grades: 256 completions by the fork server, and an eighth of them with a sandbox for each run.

The completions are those of a policy that drifts to cheating: a third honest and right, a third honest and wrong, a
third exploits, over all modes. A completion takes one run, or up to three where a channel accepts it.
"""

import os
import sys
import time

from _common import note, parser, publish

from assay.vhack.environment import MODES, Episode, grade_many, sandbox, tasks
from assay.vhack.environment.sandbox import available_backend, run


def completions(count):
    for index, task in enumerate(tasks(count, seed=8)):
        episode = Episode(task, MODES[index % len(MODES)])
        honest, wrong = episode.honest(), episode.honest(task.source(0))
        yield episode, (honest, wrong, honest if episode.mode == "none" else episode.exploit())[index % 3]


def measured(items, workers):
    started = time.perf_counter()
    grades = grade_many(items, workers=workers)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "paid": sum(grade.paid for grade in grades),
        "exploited": sum(grade.exploited for grade in grades),
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=256)
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    if available_backend() is None:
        sys.exit("no sandbox works on this machine")
    items = list(completions(given.count))
    run("print(1)")  # starts the fork server
    note("fork server")
    figures = {"fork_server": measured(items, given.workers)}
    note("one sandbox per run")
    sandbox.server = lambda backend: None
    few = items[: max(1, given.count // 8)]
    figures["one_per_run"] = {"completions": len(few), **measured(few, given.workers)}
    publish(
        "vhack_sandbox",
        {
            "backend": available_backend(),
            "completions": given.count,
            "workers": given.workers,
            "cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0],
            **figures,
        },
        given.output,
    )


if __name__ == "__main__":
    main()
