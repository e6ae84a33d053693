"""A model over several devices: a basis from nothing, the gradients of 24 samples, and memory against the formula.

Every process of FSDP2 and of tensor parallelism has one device; with ``--by device-map`` one process has all. The
formula is that of docs/vhack.md without activations, for FSDP2. What activations take is the slope of the peak over the
tokens of the largest batch, and where that line meets no tokens is what the formula is held against. A rate is scaled
by parameters: tokens per second and device, times the parameters of the model. ``--one`` names figures of
``vhack_gradients.py`` on the same machine, to whose best time the scaled rate is held.

    python benchmarks/vhack_gradients.py --device cuda --models shape:qwen3-4b -o one.json
    torchrun --nproc-per-node 2 benchmarks/vhack_parts.py --one one.json -o benchmarks/results/vhack_parts.json

``--shares`` times the pass with other shares of the free memory for a batch. ``--quick`` times nothing but the pass,
with factors that are drawn instead of decomposed: its products take as long, and its gradients mean nothing.
``--trace FILE`` writes which operations of one more pass took the time of the first process's device.
"""

import json
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from _common import note, parser, publish
from _vhack import pairs, samples
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from assay.models import load_model, model_info
from assay.models.decoder import decoder_layers
from assay.poc.engines.hf import joined
from assay.vhack import Factors, SVDCache, extract, per_sample_gradients, target_modules
from assay.vhack.basis import _extract
from assay.vhack.gradients import _batches, _per_sample
from assay.vhack.gradients._batches import tokens_of

WAYS, SEVERAL = ("fsdp", "tensor", "device-map"), "1800 tokens"


class Place:
    """The devices of this process, and what the others say."""

    def __init__(self, device, world):
        self.world, self.leads = world, world is None or world.leads
        on_gpu = device == "cuda"
        every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if on_gpu else []
        self.devices = every if world is None else [torch.device(world.device)] if on_gpu else []
        self.count = max(1, len(self.devices)) if world is None else world.size

    def told(self, mine):
        """What every process says, in their order."""
        if self.world is None:
            return [mine]
        found = [None] * self.world.size
        dist.all_gather_object(found, mine, group=self.world.control)
        return found

    def memory(self, read):
        """Gigabytes that ``read`` says of every device of every process."""
        return [each for some in self.told([read(device) / 1e9 for device in self.devices]) for each in some]

    def timed(self, work):
        """The result, the seconds of the slowest process, and the peak of every device in gigabytes."""
        for device in self.devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.told(None)
        start = time.perf_counter()
        result = work()
        for device in self.devices:
            torch.cuda.synchronize(device)
        seconds = max(self.told(time.perf_counter() - start))
        return result, seconds, self.memory(torch.cuda.max_memory_allocated)


def spread(options, place):
    """The model in parts, with random weights that are drawn on each device whole before they are cut."""
    load = {"dtype": options.dtype}
    if options.by == "device-map":
        module = load_model(options.model, device=str((place.devices or ["cpu"])[0]), **load).module
        return dispatched(module, place.devices or [torch.device("cpu")])
    mesh = init_device_mesh(options.device, (place.count,))
    if options.by == "tensor":
        return load_model(options.model, device=place.world.device, mesh=mesh, **load).module
    module = load_model(options.model, device=place.world.device, **load).module
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return module


def dispatched(module, devices):
    """As many layers on each device as on any other; embeddings on the first, norm and head on the last."""
    from accelerate import dispatch_model

    names = {id(part): name for name, part in module.named_modules()}
    layers = decoder_layers(module)
    places = {names[id(layer)]: devices[index * len(devices) // len(layers)] for index, layer in enumerate(layers)}
    base = module.base_model_prefix
    others = [f"{base}.{name}" for name, _ in module.get_submodule(base).named_children()]
    places |= {name: devices[0] for name in others if not any(each.startswith(f"{name}.") for each in places)}
    places |= {f"{base}.norm": devices[-1], "lm_head": devices[-1]}
    return dispatch_model(module, places, force_hooks=True)


def formula(module, processes):
    """What docs/vhack.md says that one of several processes needs under FSDP2 without activations, in gigabytes."""
    weights = {name: linear.weight for name, linear in target_modules(module).items()}
    size = next(iter(weights.values())).element_size()
    factor = 2 if size == 2 and next(iter(weights.values())).is_cuda else 4
    numbers = [min(weight.shape) * sum(weight.shape) for weight in weights.values()]
    every = sum(parameter.numel() for parameter in module.parameters())
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(module)]
    terms = {
        "weights": size * every / processes,
        "factors": factor * sum(numbers) / processes,
        "gathered_weights": size * (2 * max(layers) + every - sum(layers)),
        "gathered_factors": factor * max(numbers),
    }
    return {name: value / 1e9 for name, value in terms.items()}


@contextmanager
def watched():
    """The factors of an extraction with their seconds, and the turns of a pass: tokens, and layers recomputed."""
    seen, make, turn = {"turns": []}, _extract.weight_svd, _per_sample._unsplit

    def made(*arguments, **named):
        start = time.perf_counter()
        seen["svd"] = make(*arguments, **named)
        seen["svd_seconds"] = time.perf_counter() - start
        return seen["svd"]

    def taken(replica, batch):
        seen["turns"].append(tokens_of(batch, packed=replica.recipe.packed))
        seen["recomputed"] = replica.recomputed
        return turn(replica, batch)

    _extract.weight_svd, _per_sample._unsplit = made, taken
    try:
        yield seen
    finally:
        _extract.weight_svd, _per_sample._unsplit = make, turn


def cases(options):
    """Settings of the pass; the slope of the memory is between batches of one sample and of 1800 tokens."""
    some = {"usual": {}} | {share_named(share): {} for share in options.shares}
    if options.quick:
        return some
    some |= {"checkpointing": {"checkpointing": True}}
    found = some | {"one sample": {"max_tokens": 1}, SEVERAL: {"max_tokens": 1800}}
    return found | {f"{tokens} tokens": {"max_tokens": tokens} for tokens in options.tokens}


def share_named(share):
    return f"share {share}"


@contextmanager
def sharing(name):
    """The share of the free memory for a batch that this name says; others leave it as it is."""
    usual = _batches._GATHERING_SHARE
    _batches._GATHERING_SHARE = float(name.partition("share ")[2] or usual)
    try:
        yield _batches._GATHERING_SHARE
    finally:
        _batches._GATHERING_SHARE = usual


def drawn(module):
    """Divided factors of the right size and form, with random numbers."""
    from torch.distributed.tensor import Shard, distribute_tensor

    found = {}
    for name, linear in target_modules(module).items():
        (outputs, inputs), mesh = linear.weight.shape, linear.weight.device_mesh
        rank, device = min(outputs, inputs), linear.weight.device
        like = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32, "device": device}
        left = distribute_tensor(torch.randn(outputs, rank, **like) / outputs**0.5, mesh, [Shard(0)])
        right = distribute_tensor(torch.randn(rank, inputs, **like) / inputs**0.5, mesh, [Shard(1)])
        found[name] = Factors(left, torch.linspace(2, 1, rank, device=device), right, 0.0, 0.0)
    return SVDCache(found, rank=None, dtype=left.dtype)


def traced(work, place, options):
    """Run it once more under the profiler of the first process, and write a table."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    with profile(activities=kinds) if place.leads else nullcontext() as found:
        work()
    if place.leads:
        by = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
        options.trace.write_text(found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90))


def measured(options, place):
    """The figures, again with every row that is added."""
    tokenizer = load_model("reference:qwen3", device="cpu").tokenizer
    module, seconds, peak = place.timed(lambda: spread(options, place))
    parameters = model_info(options.model).parameters
    figures = {
        "model": options.model,
        "by": options.by,
        "devices": place.count,
        "dtype": str(module.dtype),
        "parameters": parameters,
        "made": {"seconds": seconds, "peak_gb": peak},
        "gradients": {},
    }
    if options.by == "fsdp":
        figures["formula_gb"] = formula(module, place.count)
    yield figures
    with watched() as seen:
        if options.quick:
            seen["svd"] = drawn(module)
            figures["factors"] = "drawn, not decomposed"
        else:
            some = pairs(tokenizer, options.pairs)
            _, seconds, peak = place.timed(lambda: extract(some, module, tokenizer=tokenizer, n_heldout=0))
            figures["extraction"] = {
                "pairs": options.pairs,
                "seconds": seconds,
                "of_these_factors": max(place.told(seen["svd_seconds"])),
                "peak_gb": peak,
                "kept_gb": place.memory(torch.cuda.memory_allocated),
            }
        yield figures
        chosen = samples(tokenizer, options.samples)
        tokens = sum(len(tokenizer(one.prompt + one.completion)["input_ids"]) for one in chosen)
        figures |= {"samples": len(chosen), "tokens": tokens}

        def once(case):
            return per_sample_gradients(chosen, module, tokenizer=tokenizer, svd=seen["svd"], **case)

        for name, case in cases(options).items():
            taken = []
            for turn in range(1 + options.rounds):
                note(f"{name}, turn {turn}")
                seen["turns"].clear()
                with sharing(name) as share:
                    _, seconds, peak = place.timed(lambda case=case: once(case))
                taken += [seconds] if turn else []  # the first warms up
            rate = tokens / min(taken) / place.count
            row = {"seconds": taken, "tokens_per_second_and_device": rate, "rate_times_parameters": rate * parameters}
            figures["gradients"][name] = row | {
                "peak_gb": peak,
                "share_of_free_memory": share,
                "turns": len(seen["turns"]),
                "recomputed_layers": seen["recomputed"],
                "largest_batch_tokens": max(max(theirs) for theirs in place.told(seen["turns"])),
            }
            compare(figures, options.one)
            yield figures
        if options.trace:
            traced(lambda: once({}), place, options)


def compare(figures, one):
    """Add what the rows say together: the rate against one device, and the memory against the formula."""
    rows = figures["gradients"]
    if one and one.exists():
        for reference, other in json.loads(one.read_text())["models"].items():
            rate = other["tokens"] / min(other["batched_seconds"]) * model_info(reference).parameters
            shares = {name: row["rate_times_parameters"] / rate for name, row in rows.items()}
            figures["over_one_device"] = {"model": reference, "rate_times_parameters": rate} | shares
    if "formula_gb" in figures and {SEVERAL, "one sample"} <= rows.keys() and rows[SEVERAL]["peak_gb"]:
        at = [(rows[name]["largest_batch_tokens"], max(rows[name]["peak_gb"])) for name in ("one sample", SEVERAL)]
        slope, fixed = np.polyfit(*np.transpose(at), 1).tolist()
        wanted = sum(figures["formula_gb"].values())
        figures["memory"] = {"fixed_gb": fixed, "formula_gb": wanted, "ratio": fixed / wanted, "gb_per_token": slope}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="shape:qwen3-32b")
    arguments.add_argument("--by", choices=WAYS, default=WAYS[0])
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--pairs", type=int, default=12)
    arguments.add_argument("--samples", type=int, default=24)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--tokens", type=int, nargs="*", default=[], help="other batch sizes to try")
    arguments.add_argument("--shares", type=float, nargs="*", default=[], help="other shares of the free memory to try")
    arguments.add_argument("--quick", action="store_true", help="drawn factors, and the usual batches and shares alone")
    arguments.add_argument("--trace", type=Path, help="table of the operations of one more pass")
    arguments.add_argument("--one", type=Path, help="figures of one device, from vhack_gradients.py")
    options = arguments.parse_args()
    with ExitStack() as stack:
        world = None if options.by == "device-map" else stack.enter_context(joined(device=options.device))
        place = Place(options.device, world)
        for figures in measured(options, place):
            if place.leads:
                publish("vhack_parts", figures, options.output)


if __name__ == "__main__":
    main()
