"""Time of a commitment to a million nonces, of openings and of their checks, on one core.

Pass: committed in at most 2 s of processor time, opened in at most 1 ms. Processor time, because a
machine that does other work as well would be measured too.

    OMP_NUM_THREADS=1 python research/benchmarks/commitments.py \
      -o research/results/commitments.json
"""

import statistics
import time
from dataclasses import replace

import numpy as np
from _common import parser, publish, round_to, timed

from assay.poc import Commitment, Round
from assay.poc.protocol.commitments import CommitmentTree
from assay.poc.protocol.header import FramedModelLine

VALUE_BYTES = 24  # of the artifact preset: twelve numbers in float16
TURNS = 5


def main():
    """Measure the three, and the commitment of a whole proof."""
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=1_000_000)
    chosen = arguments.parse_args()
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (chosen.nonces, VALUE_BYTES), dtype=np.uint8)
    nonces = np.arange(chosen.nonces)
    clock = time.process_time
    built = [timed(lambda: CommitmentTree(nonces, values), clock) for _ in range(TURNS)]
    tree = built[-1][1]
    model = FramedModelLine(reference="m", digest="0" * 64, weights="trained")
    round = Round(block_hash="b", public_key="k", model="m", preset="artifact")
    commitment = Commitment(round=round, model=model, top=tree.top)
    places = commitment.draw_places(1000, validator_key="v", block_hash="f")
    opened = [timed(lambda place=place: tree.open(place), clock) for place in places]
    checked = [
        timed(lambda o=opening: commitment.check_opening(o, index=o.index), clock)[0]
        for _, opening in opened
    ]
    early_count = chosen.nonces // 2 + 1
    early = replace(commitment, top=CommitmentTree(nonces[:early_count], values[:early_count]).top)
    assert tree.open(early_count).nonce == nonces[early_count]
    path = tree.prefix(early_count)
    prefix_seconds, _ = timed(lambda: commitment.check_prefix(early, path), clock)
    commit_seconds = statistics.median(seconds for seconds, _ in built)
    open_ms = 1e3 * statistics.mean(seconds for seconds, _ in opened)
    figures = {
        "nonces": chosen.nonces,
        "value_bytes": VALUE_BYTES,
        "commit_seconds": round_to(commit_seconds, 3),
        "open_ms": round_to(open_ms, 3),
        "check_ms": round_to(1e3 * statistics.mean(checked), 3),
        "prefix_ms": round_to(1e3 * prefix_seconds, 3),
        "prefix_bytes": len(path),
        "path_bytes": len(opened[0][1].path),
        "line_bytes": len(opened[0][1].line()),
        "passes": commit_seconds <= 2 and open_ms <= 1,
    }
    publish("commitments", figures, chosen.output)


if __name__ == "__main__":
    main()
