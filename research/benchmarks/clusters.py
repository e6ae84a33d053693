"""The figures of a run of `assay research clusters`, without its curves, for the documentation.

assay research clusters DATA -o experiments --run-name clusters
python research/benchmarks/clusters.py experiments/clusters -o research/results/clusters.json
"""

from pathlib import Path

from _common import parser, publish
from assay_research.clusters.clusters import summarise
from assay_research.runs.runs import read_run


def main():
    arguments = parser(__doc__)
    arguments.add_argument("run", type=Path, help="folder of the run")
    options = arguments.parse_args()
    run = read_run(options.run, "clusters")
    found = summarise(run.cells)
    for build in found["builds"]:
        for row in build["rows"]:
            del row["curve"]
    publish("clusters", {"settings": run.settings, **found}, options.output)


if __name__ == "__main__":
    main()
