"""Two CUDA devices against one, in one run: data parallel by nonce, and one model spread over both.

The first process proves alone while the other waits, then both prove together; in turns, and the figures are medians.
Then a model is spread over both devices, and its distances are held against those of one device: by the default noise,
and by a calibration on one half of the nonces that judges the other half.

    torchrun --nproc-per-node 2 research/benchmarks/gpu_parallel.py -o research/results/gpu_parallel.json
"""

import statistics
from dataclasses import replace

import numpy as np
from _common import note, parser, publish, round_to, timed
from assay_research.simulation import QWEN3
from torch.distributed.device_mesh import init_device_mesh

from assay.models import load_model
from assay.poc import HFEngine, Noise, Proof, Round, bundled_noise, calibrate, prove
from assay.poc.engines.hf.engine import auto_batch
from assay.poc.engines.hf.parallel import ParallelEngine, joined
from assay.poc.verdict import judge


def data_parallel(world, reference, options):
    """Nonces per second of one device and of all, and whether they wrote the same records."""
    model = load_model(reference, dtype="bfloat16", device=world.device)
    batch = options.batch_size or auto_batch(model, options.seq_len)
    compiled = world.device != "cpu"
    shape = {"batch_size": batch, "seq_len": options.seq_len, "compiled": compiled}
    with ParallelEngine(model, world, **shape) as together:
        if not world.leads:
            together.work()
            return None
        round = Round(block_hash="bench", public_key="k", model=reference, seq_len=options.seq_len)
        alone = HFEngine(model, **shape)
        nonces = range(batch * world.replicas * options.batches)
        proofs = {
            "one": lambda: prove(model, round, nonces, engine=alone),
            "all": lambda: prove(model, round, nonces, engine=together),
        }
        for warm in (alone, together):
            prove(model, round, nonces[: 2 * world.replicas * batch], engine=warm)
        times = {name: [] for name in proofs}
        hashes = set()
        for _ in range(options.rounds):
            for name, proved in proofs.items():
                spent, proof = timed(proved)
                times[name].append(spent)
                hashes.add(proof.footer.sha256)
        rates = {name: len(nonces) / statistics.median(values) for name, values in times.items()}
        note(f"{reference}: {rates}")
    return {
        "model": reference,
        "devices": world.size,
        "batch_size": batch,
        "nonces": len(nonces),
        "one_nonces_per_second": round_to(rates["one"]),
        "all_nonces_per_second": round_to(rates["all"]),
        "all_over_one": round_to(rates["all"] / rates["one"]),
        "same_records": len(hashes) == 1,
        "fingerprint": together.fingerprint.as_dict(),
    }


def tensor_parallel(world, reference, options):
    """Distances of a model that is spread over all devices, against those of one."""
    kind = world.device.split(":")[0]
    mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("tensor",))
    spread = replace(world, tensor_parallel=world.size, mesh=mesh)
    shape = {"batch_size": 32, "seq_len": options.seq_len}
    part = load_model(reference, dtype="bfloat16", device=world.device, mesh=mesh)
    round = Round(block_hash="bench", public_key="k", model=reference, seq_len=options.seq_len)
    nonces = range(options.checked)
    with ParallelEngine(part, spread, **shape) as engine:
        if not world.leads:
            engine.work()
            return None
        prove(part, round, nonces[:32], engine=engine)
        spent, ours = timed(lambda: prove(part, round, nonces, engine=engine))
    whole = load_model(reference, dtype="bfloat16", device=world.device)
    alone, theirs = timed(lambda: prove(whole, round, nonces, engine=HFEngine(whole, **shape)))
    half = len(nonces) // 2
    law = calibrate(_cut(ours, 0, half), _cut(theirs, 0, half)).law
    measured = Noise(law, "calibration")
    stated = bundled_noise(QWEN3, "distance", "bfloat16", "bfloat16")
    errors = np.subtract(ours.distances, theirs.distances)
    verdicts = {
        name: judge(ours, ours.records[half:], theirs.records[half:], noise).verdict
        for name, noise in (("calibration", measured), ("default", stated))
    }
    return {
        "model": reference,
        "devices": world.size,
        "checked": len(nonces),
        "residual_rms": round_to(np.sqrt(np.mean(errors**2))),
        "calibrated_sigma": round_to(measured.size),
        "default_sigma": round_to(stated.size),
        "verdicts": verdicts,
        "nonces_per_second": round_to(len(nonces) / spent),
        "one_device_nonces_per_second": round_to(len(nonces) / alone),
        "fingerprint": engine.fingerprint.as_dict(),
    }


def _cut(proof, start, end):
    header = replace(proof.header, nonces=((start, end, 1),))
    return Proof.build(header, proof.records[start:end], 0.0)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--data-model", default="shape:qwen3-0.6b")
    arguments.add_argument("--tensor-model", default="shape:llama-3.2-1b")
    arguments.add_argument("--batch-size", type=int, default=0, help="0 takes what prove takes by itself")
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--batches", type=int, default=24, help="for each device")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--checked", type=int, default=512, help="nonces of the spread model")
    options = arguments.parse_args()
    with joined(device=options.device) as world:
        figures = {
            "data_parallel": data_parallel(world, options.data_model, options),
            "tensor_parallel": tensor_parallel(world, options.tensor_model, options),
        }
        if world.leads:
            publish("gpu_parallel", figures, options.output)


if __name__ == "__main__":
    main()
