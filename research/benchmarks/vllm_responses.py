"""Seeded responses of a vLLM server: the tokens of transformers, and the cost beside a server without them.

`tokens` sends requests of mixed parameters to servers of several settings and answers the same requests with `respond`
on transformers: the receipts must have the same tokens. A replay says how many tokens match where they differ, as they
do in bfloat16. `cost` runs two servers, one with ASSAY_RESPONSES=seeded and a block, one with neither, and sends both
the same load in turns, so that whatever else the machine does falls on both: tokens a second, and the time between two
tokens of a stream. `audits` draws audits of honest responses that a server of each setting served, replayed by
transformers in float32 and bfloat16 and judged by the stated defaults.

    python vllm_responses.py tokens --requests 200
    python vllm_responses.py audits --gpu --dtype bfloat16 --settings default v1
    python vllm_responses.py tokens --requests 200 --gpu --settings default v1 ngram draft
    python vllm_responses.py cost --gpu --model shape:qwen3-0.6b --dtype bfloat16 --at-once 32
"""

import shutil
import tempfile
from pathlib import Path

from _common import parser, publish
from _vllm import REFERENCE
from _vllm_audits import audits
from _vllm_cost import cost
from _vllm_tokens import SETTINGS, tokens

from assay.models import save_random


def main():
    made = parser(__doc__)
    made.add_argument("part", choices=("tokens", "audits", "cost"))
    made.add_argument("--requests", type=int, default=200, help="of each turn")
    made.add_argument("--tokens", type=int, nargs="+", default=[64], help="of an answer, for cost")
    made.add_argument("--turns", type=int, default=6)
    made.add_argument("--servers", type=int, default=1, help="of each kind, for cost")
    made.add_argument("--alike", type=int, default=0, help="turns before a block is known, for cost")
    made.add_argument("--at-once", type=int, default=8)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--top-p", type=float, nargs="+", default=[1.0])
    made.add_argument("--no-seeds", action="store_true", help="requests of cost have no seeds of their own")
    made.add_argument("--model", default=str(REFERENCE))
    made.add_argument("--dtype", default="float32")
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default"], help="of servers, for tokens")
    made.add_argument("--gpu", action="store_true", help="servers on a GPU: compiled layers and graphs, for cost")
    arguments = made.parse_args()
    figures = {"part": arguments.part, "model": Path(arguments.model).name, "dtype": arguments.dtype}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model.startswith("shape:"):  # vLLM needs a checkpoint, and a tokenizer for its streams
            made = save_random(arguments.model, Path(folder) / "made", weights="random-all", dtype=arguments.dtype)
            for file in REFERENCE.glob("tokenizer*"):
                shutil.copy(file, made)
            arguments.model = str(made)
        if arguments.part == "tokens":
            figures |= tokens(arguments, Path(folder))
        elif arguments.part == "audits":
            figures |= audits(arguments, Path(folder))
        else:
            figures |= {"at_once": arguments.at_once} | cost(arguments)
    publish(f"vllm_responses_{arguments.part}", figures, arguments.output)


if __name__ == "__main__":
    main()
