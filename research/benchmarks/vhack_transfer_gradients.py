"""All registered detectors, those by gradients among them, fitted to our own pairs and asked of
what others wrote (research/notes/transfer.md). It takes a backward pass of every sample: minutes on
a GPU, hours on a CPU. With --forward, what needs a backward pass is left out. The result is written
after every origin.

    python research/benchmarks/vhack_transfer_gradients.py --data DATA --codeforces REPOSITORY \
      --device cuda -o research/results/vhack_transfer_gradients.json
"""

from pathlib import Path

from _common import note, parser, publish
from assay_research.transfer import evaluate
from assay_research.transfer.kinds import kind_pairs
from assay_research.transfer.origins import from_pairs, own_samples, read_origin, subset

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.detectors.comparison import make_detectors
from assay.vhack.detectors.evidence import Needs, collect_evidence
from assay.vhack.pairs.pairs import Sample

MOST_PROMPT = 4000  # characters; the beginning of a longer one is cut
MOST_COMPLETION = 3000
AT_CEILING = ("ngrams", "probe", "cin-lda", "ridge")


def read_evidence(samples, model, svd, needs):
    """Parts of the evidence of samples, with labels."""
    read = [
        Sample(sample.prompt[-MOST_PROMPT:], sample.completion[:MOST_COMPLETION])
        for sample in samples
    ]
    return evaluate.labelled(collect_evidence(read, model, svd=svd, needs=needs), samples)


def main():
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the files of others")
    options.add_argument("--codeforces", type=Path, help="git directory of origin D")
    options.add_argument("--origins", nargs="+", default=["A", "B", "C", "D", "E"])
    options.add_argument("--own", nargs="+", default=["authored", "generated:48", "exploits:24"])
    options.add_argument("--kinds", type=int, default=96, help="pairs of more kinds")
    options.add_argument("--model", default="pretrained:smollm2")
    options.add_argument("--device", default="cpu")
    options.add_argument("--forward", action="store_true", help="without gradients")
    chosen = options.parse_args()
    model = load_model(chosen.model, device=chosen.device, dtype="float32")
    needs = Needs.ACTIVATIONS | Needs.LOGPROBS if chosen.forward else Needs.ALL
    svd = None if chosen.forward else weight_svd(model)
    fitted = [
        detector for detector in make_detectors() if not detector.needs & ~(needs | Needs.TEXTS)
    ]
    promised = [detector for detector in fitted if detector.name in AT_CEILING]
    own_lists = [own_samples(name) for name in chosen.own]
    if chosen.kinds:
        own_lists.append(from_pairs(kind_pairs(chosen.kinds)))
    own_evidence = evaluate.concatenated(
        [read_evidence(samples, model, svd, needs) for samples in own_lists]
    )
    note(f"own: {len(own_evidence.hack)} pairs")
    results = {}
    for name in chosen.origins:
        samples = subset(read_origin(name, chosen.data, chosen.codeforces))
        target = read_evidence(samples, model, svd, needs)
        results[name] = {
            "samples": [len(target.hack), len(target.clean)],
            "transferred": {
                detector.name: evaluate.transferred(detector, own_evidence, target)
                for detector in fitted
            },
            "ceiling": {
                detector.name: evaluate.ceiling(detector, target)
                for detector in promised
                # It takes differences of pairs, which the rollouts of E are not in.
                if detector.name != "cin-lda" or len(target.hack) == len(target.clean)
            },
            "promise": {
                detector.name: evaluate.promise(detector, own_evidence, {name: target})[name]
                for detector in promised
            },
        }
        note(f"{name}: {results[name]}")
        head = {"model": chosen.model}
        publish("vhack_transfer_gradients", head | {"origins": results}, chosen.output)


if __name__ == "__main__":
    main()
