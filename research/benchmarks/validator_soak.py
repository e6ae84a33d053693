"""Two hundred kills of a validator and as many of its senders: a thousand nodes send, and all evidence counts once.

Every kill is a SIGKILL of a real `assay poc validator` or of a process that sends, at random moments, some while the
validator starts. Every twentieth node lies. Afterwards every acknowledged message must be in the inbox once, and every
nonce that was drawn in the ledger once. The script ends with exit code 1 if a figure that must be zero is not.

    python benchmarks/validator_soak.py -o benchmarks/results/validator_soak.json
"""

import sys
import tempfile
from pathlib import Path

from _common import note, parser, publish
from service_soak import save_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.poc.validator.killing import MUST_BE_ZERO, kill_loop


def main():
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--nodes", type=int, default=1000)
    options.add_argument("--seed", type=int, default=20)
    chosen = options.parse_args()
    from assay.models import load_model

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "small"
        save_checkpoint(checkpoint)
        model = load_model(checkpoint, dtype="float32", device="cpu")
        note(f"{chosen.kills} kills of each, a few seconds each")
        outcome = kill_loop(
            Path(directory), model, checkpoint, nodes=chosen.nodes, kills=chosen.kills, seed=chosen.seed
        ).as_dict()
    publish("validator_soak", {"seed": chosen.seed, **outcome}, chosen.output)
    return int(any(outcome[name] for name in MUST_BE_ZERO))


if __name__ == "__main__":
    sys.exit(main())
