"""Two hundred kills: a generating service dies at random moments, its receiver misbehaves, and nothing is lost.

Every kill is a SIGKILL of a real `assay poc serve`; half of the receiver's answers are errors, resets, lost or late.
The figures that must be zero end the script with exit code 1 if they are not.

    python benchmarks/service_soak.py -o benchmarks/results/service_soak.json
"""

import sys
import tempfile
from pathlib import Path

from _common import note, parser, publish

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conftest import SMALL
from tests.end_to_end.killing import kill_loop

MUST_BE_ZERO = (
    "lost_records",
    "repeated_records",
    "undelivered_nonces",
    "nonces_in_two_callbacks",
    "callbacks_that_changed",
    "dead_letters",
)


def save_checkpoint(path):
    """Write the checkpoint of the tests: 0.2 M random parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(path)


def main():
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=20)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "small"
        save_checkpoint(checkpoint)
        note(f"{chosen.kills} kills, a few seconds each")
        outcome = kill_loop(Path(directory), checkpoint, kills=chosen.kills, seed=chosen.seed).as_dict()
    publish("service_soak", {"seed": chosen.seed, **outcome}, chosen.output)
    return int(any(outcome[name] for name in MUST_BE_ZERO))


if __name__ == "__main__":
    sys.exit(main())
