r"""Parameters for a chain's count rule from a calibration of its machines, and what they cost.

The calibration is of published vectors of MiniMax-M2.7 on machines of a network, without the two
that are faulty (docs/networks.md). Null: an honest machine that was not measured; an audit of 200
nonces. Pass: the upper end of the share of audits that accuse it is at most 0.001.

    printf '[poc.calibrate]\nvectors = "cluster_nonces.jsonl.gz"\nsets = "2026-05,minimax,-2xh200"
    digest = "%064d"\n' 0 > sets.toml
    assay poc calibrate --config sets.toml -o minimax.json
    python research/benchmarks/chain_rule.py minimax.json -o research/results/chain_rule.json
"""

from pathlib import Path

from _common import parser, publish

from assay.poc import Calibration
from assay.poc.verdict.chain_rule import export_rule

BOUND = 0.001


def main():
    """Export the parameters at two lengths of an audit."""
    arguments = parser(__doc__)
    arguments.add_argument("calibration", type=Path)
    chosen = arguments.parse_args()
    calibration = Calibration.load(chosen.calibration)
    exports = {str(n): export_rule(calibration, checked=n, alpha=BOUND) for n in (64, 200)}
    figures = {
        "machines": [len(build.machines) for build in calibration.builds],
        "by_nonces": {n: exported.as_dict() for n, exported in exports.items()},
        "passes": all(
            cost.high <= BOUND
            for exported in exports.values()
            for cost in exported.costs
            if cost.rule == "measured"
        ),
    }
    publish("chain_rule", figures, chosen.output)


if __name__ == "__main__":
    main()
