"""What the proofs of `gpu_float8.py` say: equal bits, honest noise between engines and machines, and laws of pairs.

The first folder holds the proofs of the prover's machine; the others those of other machines.

- `bits`: SHA-256 of the records of one block, for every engine and machine.
- `noise`: standard deviation of distances minus those of the prover, which runs the engine's own kernels in batches of
  128, and the share of distances that are equal; over all blocks, and the least and the largest deviation of a block.
- `laws`: for every validator, the law that `calibrate` gives of one block; how many audits of 64 nonces of other blocks
  it accuses, no nonce in two of them; and how far every cheat is, in root mean squares over the honest one, with its
  AUC and the checked nonces after which 99 % of simulated audits accuse it.

    python benchmarks/float8_laws.py h200 h100 cpu -o benchmarks/results/float8_laws.json
"""

import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from gpu_float8 import ARITHMETICS, BATCHES, CALIBRATING, MIXTURE, MODELS, PRESETS

from assay import stats
from assay.models import model_info
from assay.poc import Proof, calibrate, get_pipeline
from assay.poc.verdict import noise_for, residuals, sequential_test
from assay.reports import read_json
from assay.research.redteam import ALPHA, Judge, Pool, make_experts, smallest

AUDITED = 64  # nonces of an audit
PROVER = f"own kernels, {BATCHES[0]}"
VALIDATORS = (f"own kernels, {BATCHES[1]}", "eager kernels", "plain attention", "cpu")


@dataclass(frozen=True)
class Engine:
    """The proofs of one engine on one machine."""

    folder: Path
    machine: str

    @property
    def name(self):
        """What proved."""
        return self.folder.name

    @cached_property
    def blocks(self):
        """All blocks, in the order of their names."""
        return sorted(path.name for path in self.folder.iterdir())

    def has(self, block, preset):
        """Whether it proved a block with a preset."""
        return (self.folder / block / f"{preset}.jsonl").is_file()

    @cache  # noqa: B019 - an engine lives as long as the process
    def proof(self, block, preset):
        """The proof of a block with a preset."""
        return Proof.load(self.folder / block / f"{preset}.jsonl")


class Case:
    """One model in one format, on all machines."""

    def __init__(self, folders, machines, model, form):
        name = model.rpartition(":")[2]
        self.model, self.form = model, form
        self.hidden_size = hidden_size_of(model)
        self.engines = [
            Engine(path, machine)
            for folder, machine in zip(folders, machines, strict=True)
            for path in sorted((folder / name / form).glob("*"))
        ]
        self.prover = next((engine for engine in self.engines if engine.name == PROVER), None)

    def validators(self):
        """Those of the prover's machine, and what its own kernels are on the others."""
        for engine in self.engines:
            here = engine.machine == self.prover.machine
            if engine.name in VALIDATORS if here else engine.name == PROVER:
                yield engine

    def cheats(self):
        """Those of the prover's machine."""
        return [e for e in self.engines if e.name.startswith("cheat: ") and e.machine == self.prover.machine]

    def bits(self):
        """The hash of the block that laws come from, of every engine."""
        for engine in self.engines:
            if engine.has(CALIBRATING, PRESETS[0]):
                proof = engine.proof(CALIBRATING, PRESETS[0])
                found = {"machine": engine.machine, "engine": engine.name, "nonces": len(proof.records)}
                fingerprint = proof.header.fingerprint
                yield found | {
                    "sha256": proof.footer.sha256,
                    "fingerprint": fingerprint.as_dict(),
                    "id": fingerprint.id,
                }

    def noise(self):
        """Of distances, against the prover, and of eager kernels against those of the other machine."""
        eager = [engine for engine in self.engines if engine.name == "eager kernels"]
        others = [e for e in self.engines if not e.name.startswith("cheat: ")] + self.cheats()
        pairs = [(self.prover, other) for other in others if other is not self.prover]
        for one, other in pairs + [tuple(eager)] * (len(eager) == 2):
            shared = [b for b in one.blocks if one.has(b, PRESETS[0]) and other.has(b, PRESETS[0])]
            of_blocks = [between(one, other, block, PRESETS[0]) for block in shared]
            errors, sds = np.concatenate(of_blocks), [np.std(errors) for errors in of_blocks]
            yield {
                "between": [[engine.machine, engine.name] for engine in (one, other)],
                "nonces": errors.size,
                "sd": rounded(np.std(errors)),
                "sd_of_blocks": [rounded(min(sds)), rounded(max(sds))],
                "equal": rounded(np.mean(errors == 0)),
            }


def hidden_size_of(model):
    """The width of a model; the mixture is made on the spot."""
    with tempfile.TemporaryDirectory() as folder:
        return model_info(make_experts(Path(folder)) if model == MIXTURE else model).hidden_size


def between(received, recomputed, block, preset):
    """Residuals of the nonces that two engines have in common, [N]."""
    one, other = (engine.proof(block, preset).records for engine in (received, recomputed))
    count = min(len(one), len(other))
    return residuals(one[:count], other[:count])


def law_row(case, validator, preset):
    """The law of a pair of engines, and what it says of honest audits and of cheats."""
    prover = case.prover
    calibrating = [engine.proof(CALIBRATING, preset) for engine in (prover, validator)]
    calibration = calibrate(*calibrating, hidden_size=case.hidden_size)
    audited = [b for b in prover.blocks if b != CALIBRATING and prover.has(b, preset) and validator.has(b, preset)]
    accused = total = 0
    honest = {block: between(prover, validator, block, preset) for block in audited}
    for block, errors_N in honest.items():
        audits_RC = errors_N[: errors_N.size // AUDITED * AUDITED].reshape(-1, AUDITED)
        test = sequential_test(noise(prover, validator, block, preset, calibration), alpha=ALPHA)
        accused += int(test.accusations(audits_RC)[:, -1].sum())
        total += len(audits_RC)
    first = audited[0]
    judge = Judge(get_pipeline(preset), honest[first], noise(prover, validator, first, preset, calibration))
    every = np.concatenate(list(honest.values()))
    row = {
        "preset": preset,
        "validator": [validator.machine, validator.name],
        "honest_rms": rms(every),
        "honest_equal": rounded(np.mean(every == 0)),
        "audits": total,
        "accused": accused,
        "interval": [rounded(value) for value in stats.proportion_interval(accused, total, 0.95)],
        "cheats": {e.name.removeprefix("cheat: "): caught(judge, e, validator, honest, first) for e in case.cheats()},
    }
    note(f"{case.model} in {case.form}: {row}")
    return row


def noise(prover, validator, block, preset, calibration):
    """The honest noise in a block."""
    fingerprint = validator.proof(block, preset).header.fingerprint
    return noise_for(prover.proof(block, preset).header, fingerprint, calibration)


def caught(judge, cheat, validator, honest, block):
    """How far a cheat is, and when it is caught."""
    errors_N = between(cheat, validator, block, judge.pipeline.name)
    honest_rms = rms(honest[block])
    return {
        "rms": rms(errors_N),
        "over_honest": rounded(rms(errors_N) / honest_rms) if honest_rms else None,
        "auc": rounded(stats.auroc(np.abs(errors_N), np.abs(honest[block]))),
        "checked": smallest(judge.sequential(Pool(((1.0, errors_N),)))),
    }


def rms(errors_N):
    return rounded(np.sqrt(np.mean(errors_N**2)))


def rounded(value):
    return float(f"{value:.4g}")


def judged(case):
    """All of one case."""
    laws = [
        law_row(case, validator, preset)
        for validator in case.validators()
        for preset in PRESETS
        if validator.has(CALIBRATING, preset)
    ]
    found = {"model": case.model, "format": case.form, "bits": list(case.bits()), "noise": list(case.noise())}
    return found | {"laws": laws}


def main():
    made = parser(__doc__)
    made.add_argument("folders", nargs="+", type=Path, help="proofs of the prover's machine, and of others")
    options = made.parse_args()
    origins = [read_json(min(folder.glob("*.json"))) for folder in options.folders]
    machines = [(origin["gpu"] or "CPU").removeprefix("NVIDIA ") for origin in origins]
    if len(set(machines)) < len(machines):
        machines = [f"{machine} ({index})" for index, machine in enumerate(machines, 1)]
    cases = [Case(options.folders, machines, model, form) for model in MODELS for form in ARITHMETICS]
    figures = {
        "audited": AUDITED,
        "machines": dict(zip(machines, origins, strict=True)),
        "cases": [judged(case) for case in cases if case.prover],
    }
    publish("float8_laws", figures, options.output)


if __name__ == "__main__":
    main()
