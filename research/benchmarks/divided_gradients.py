"""δS factors and gradients of a model that is divided over processes or devices, beside the whole
one: how far they are apart, the seconds, and the largest memory of a process.

Ways: the whole model on one device; FSDP2 and the tensor parallelism of transformers, in a process
for each share; and accelerate's device_map, which spreads the layers over devices from one process
(over memory and disk where there is no GPU). Time and memory are of factors and gradients, not of
loading.

    OMP_NUM_THREADS=1 python research/benchmarks/divided_gradients.py \
      -o research/results/divided_gradients.json
    python research/benchmarks/divided_gradients.py --device cuda --model shape:qwen3-4b \
      --shares 2 4 --samples 24 -o OUTPUT

With ``--room GB`` a process has so many GB of each GPU, loading apart: what a division is for. The
whole model is measured with all memory and with that, and a way that does not fit says so.
"""

import os
import resource
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from _common import note, parser, publish, round_to, timed
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import ProcessRaisedException
from vhack_gradients import texts

from assay.errors import OutOfMemory
from assay.models import load_model
from assay.models.load import load_tokenizer
from assay.vhack import Sample, per_sample_gradients, weight_svd
from tests.vhack.test_divided import by_fsdp, by_transformers

WAYS = {"fsdp": by_fsdp, "tensor": by_transformers}
WAIT = timedelta(minutes=9)


def load(chosen, device):
    """Return the model on a device, and samples of pieces of Python source."""
    # A GPU draws the weights of a shape a hundred times faster.
    place = "cuda" if chosen.device == "cuda" else "cpu"
    model = load_model(chosen.model, dtype=chosen.dtype, device=place)
    # A shape has no tokenizer; any ids below its vocabulary will do.
    tokenizer = model.tokenizer or load_tokenizer("reference:qwen3")
    samples = [Sample(*sides) for sides in texts(tokenizer, chosen.samples)]
    return model.module.to(device), tokenizer, samples


def leave_room(chosen, devices):
    """Let this process have no more of each device than was asked for, the model included."""
    torch.cuda.empty_cache()
    for device in devices if chosen.room else ():
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, chosen.room * 1e9 / total), device)


def measure(module, tokenizer, samples):
    """Return gradients by module, and the seconds and memory that factors and gradients took."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    factor_seconds, svd = timed(lambda: weight_svd(module))
    gradient_seconds, rows = timed(
        lambda: dict(per_sample_gradients(samples, module, tokenizer=tokenizer, svd=svd))
    )
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        peak = max(torch.cuda.max_memory_allocated(device) for device in devices)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return rows, {
        "factor_seconds": round_to(factor_seconds, 4),
        "gradient_seconds": round_to(gradient_seconds, 4),
        "peak_gb": round_to(peak / 1e9, 4),
    }


def share(rank, chosen, way, shares, folder):
    """Measure one share of a divided model, and leave what it found in the folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device = torch.device("cuda", rank) if chosen.device == "cuda" else torch.device("cpu")
    if chosen.device == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store-{way}-{shares}", shares)
    backend = "nccl" if chosen.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=shares, timeout=WAIT)
    # Whole in memory first: what is measured begins with the divided model.
    module, tokenizer, samples = load(chosen, "cpu")
    divided = WAYS[way](module, init_device_mesh(device.type, (shares,))).to(device)
    leave_room(chosen, [rank])
    torch.save(measure(divided, tokenizer, samples), f"{folder}/{way}-{shares}-{rank}.pt")
    dist.destroy_process_group()


def spread(chosen, shares, folder):
    """Measure a model whose layers are spread by accelerate's device_map."""
    module, tokenizer, samples = load(chosen, "cpu")
    never_cut = list(module._no_split_modules)
    if chosen.device == "cuda":
        room = {index: torch.cuda.mem_get_info(index)[0] for index in range(shares)}
        room = get_balanced_memory(module, room, no_split_module_classes=never_cut)
        places = infer_auto_device_map(module, room, no_split_module_classes=never_cut)
    else:
        last = len(module.model.layers) - 1
        parts = dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        layers = {f"model.layers.{index}": "cpu" for index in range(last)}
        places = parts | layers | {f"model.layers.{last}": "disk"}
    dispatched = dispatch_model(
        module, places, main_device="cpu" if chosen.device == "cpu" else 0, offload_dir=str(folder)
    )
    leave_room(chosen, range(shares))
    return measure(dispatched, tokenizer, samples)


def divide(way, chosen, shares, folder):
    """Return what every process measured of a model that is divided so, and what did not fit."""
    try:
        if way == "whole":
            whole = load(chosen, "cuda:0")
            leave_room(chosen, [0])
            return [measure(*whole)], None
        if way == "device_map":
            return [spread(chosen, shares, folder)], None
        torch.multiprocessing.spawn(share, (chosen, way, shares, folder), nprocs=shares)
    except (torch.OutOfMemoryError, OutOfMemory, ProcessRaisedException) as error:
        if "OutOfMemory" not in f"{type(error).__name__} {error}":
            raise
        return [], str(error).strip().splitlines()[-1][:200]
    files = [f"{folder}/{way}-{shares}-{rank}.pt" for rank in range(shares)]
    return [torch.load(file, weights_only=True) for file in files], None


def largest_error(rows, whole):
    """Return the largest relative error of a module's gradients."""
    return max(float((rows[name] - whole[name]).norm() / whole[name].norm()) for name in whole)


def main():
    """Measure the whole model and every division."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="reference:qwen3")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--shares", type=int, nargs="+", default=[2])
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--room", type=float, default=0.0, help="GB of each GPU; 0 leaves all")
    chosen = arguments.parse_args()
    whole, cost = measure(*load(chosen, "cuda:0" if chosen.device == "cuda" else "cpu"))
    rows = {"whole": cost}
    note(f"whole: {cost}")
    ways = ["whole"] if chosen.room else []
    for shares in chosen.shares:
        for way in (*ways, "device_map", *WAYS):
            with tempfile.TemporaryDirectory() as folder:
                processes, failure = divide(way, chosen, shares, Path(folder))
            costs = [cost for _, cost in processes]
            name = f"{way} {1 if way == 'whole' else shares}"
            rows[name] = (
                {"does_not_fit": failure}
                if failure
                else {
                    "error": round_to(
                        max(largest_error(found, whole) for found, _ in processes), 3
                    ),
                    **{figure: max(cost[figure] for cost in costs) for figure in costs[0]},
                }
            )
            note(f"{name}: {rows[name]}")
        settings = {name: getattr(chosen, name) for name in ("model", "dtype", "samples", "room")}
        publish("divided_gradients", settings | {"rows": rows}, chosen.output)


if __name__ == "__main__":
    main()
