"""Whether copies of honest messages put off a conviction, or cost a validator passes.

A node sends two messages in each of eight blocks: 50 nonces as far off as with 4 bits, and 50
honest ones. K copies of the honest one follow under other ids, half of them before it. Inbox,
ledger and draws are those of a validator; residuals are drawn by nonce from a law like that of
`tokens-1`, so runs differ by the copies alone.

Rule, fixed before: draws of new nonces, passes and nonces to conviction within 5 % of K = 0. The
seconds of a pass are shown, and are no part of the rule.

    python research/benchmarks/copies.py -o research/results/copies.json
"""

import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
from _common import parser, publish

from assay import stats
from assay.poc import Noise, Round, get_pipeline
from assay.poc.validator import inbox as inbox_module
from assay.poc.validator.claims import Claim
from assay.poc.validator.epochs import draw
from assay.poc.validator.inbox import Inbox, Message
from assay.poc.verdict import Account, Ledger
from assay.poc.verdict.entries import LedgerUpdate, round_identity

COPIES = (0, 1, 9, 99, 999, 9999)
BLOCKS = 8
NONCES = 50
SAMPLE = 8
MULTIPLE = 5.0
TOGETHER = 500  # messages of one transaction
LAW = stats.LogNoise(-3.2, 0.28)
ACCOUNT = Account(public_key="node", digest="model", build="build", preset="poc-2.0")


def message(block, name, nonces):
    """Return a message of some nonces; its values are looked up by nonce when they are drawn."""
    round = Round(block_hash=block, public_key="node", block_height=1, r_target=1.416)
    claim = Claim(round, [*nonces], [1.0] * len(nonces))
    return Message("node", name, "generated", len(nonces), name.encode(), claim.encode(), "pins")


def messages(copies):
    """Yield all messages of the node in the order in which they arrive."""
    for number in range(BLOCKS):
        block = f"block{number}"
        honest = range(NONCES, 2 * NONCES)
        yield from (message(block, f"{block}/early{i}", honest) for i in range(copies // 2))
        yield message(block, f"{block}/cheap", range(NONCES))
        yield message(block, f"{block}/honest", honest)
        late = copies - copies // 2
        yield from (message(block, f"{block}/late{i}", honest) for i in range(late))


def residual(block, nonce):
    """Return the residual of a nonce, which depends on nothing else."""
    rng = np.random.default_rng([int(block.removeprefix("block")), nonce])
    size = float(np.exp(LAW.mu + LAW.sd * rng.normal()))
    return size * MULTIPLE if nonce < NONCES else size


def run(copies, folder):
    """Return passes, nonces and draws until the node is convicted, or nothing is left."""
    noise = Noise(LAW, "like tokens-1")
    pipeline = get_pipeline("poc-2.0")
    drawn = Counter()
    passes = 0
    spent = 0.0
    convicted = None
    with (
        closing(Inbox(folder, epoch_seconds=86_400, sample=SAMPLE)) as box,
        Ledger(folder / "ledger.sqlite3") as ledger,
    ):
        begun = time.perf_counter()
        waiting = [*messages(copies)]
        for start in range(0, len(waiting), TOGETHER):
            box.add(waiting[start : start + TOGETHER])
        intake = time.perf_counter() - begun
        begun = time.perf_counter()
        while draws := box.plan(["node"], SAMPLE):
            passes += 1
            updates = []
            for one in draws:
                claim = Claim.decode(one.claim, one.nonces, pipeline)
                places = draw(one.seed, claim.nonces, one.drawn, one.planned)
                nonces = [claim.nonces[place] for place in places]
                block = claim.round.block_hash
                drawn.update("cheap" if nonce < NONCES else "honest" for nonce in nonces)
                updates.append(
                    LedgerUpdate(
                        account=ACCOUNT,
                        round=round_identity(claim.round),
                        block_hash=block,
                        noise=noise,
                        nonces=nonces,
                        residuals=[residual(block, nonce) for nonce in nonces],
                        name=one.name,
                    )
                )
            standing = ledger.append(updates)[-1]
            box.finish(draws)
            if standing.verdict == "fraud" and convicted is None:
                convicted = {"passes": passes, "nonces": sum(drawn.values()), **drawn}
                spent = time.perf_counter() - begun
        return {
            "copies": copies,
            "messages": len(waiting),
            "convicted": convicted,
            "seconds_to_conviction": round(spent, 3),
            "all": {"passes": passes, "counted": standing.evidence.n, **drawn},
            "messages_a_second": round(len(waiting) / intake),
        }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--most", type=int, default=COPIES[-1], help="largest K")
    options = arguments.parse_args()
    inbox_module.token_bytes = lambda size: bytes(size)  # one secret, so that runs compare
    rows = []
    for copies in (count for count in COPIES if count <= options.most):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(copies, Path(folder)))
        print(rows[-1], flush=True)
    first = rows[0]
    for row in rows:
        row["ratios"] = {
            name: row["convicted"][name] / first["convicted"][name] for name in ("passes", "nonces")
        } | {name: row["all"][name] / first["all"][name] for name in ("passes", "cheap", "honest")}
    holds = all(abs(ratio - 1) <= 0.05 for row in rows for ratio in row["ratios"].values())
    publish("copies", {"rows": rows, "holds": holds}, options.output)


if __name__ == "__main__":
    main()
