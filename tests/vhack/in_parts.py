"""What each of two processes does in the tests of models in parts; a module of its own, for it is spawned."""

from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from assay.errors import AssayError
from assay.models import load_model
from assay.vhack import extract, per_sample_gradients, weight_svd
from assay.vhack.delta import DeltaS
from assay.vhack.gradients import per_sample as _per_sample
from assay.vhack.gradients import taps as _taps
from assay.vhack.gradients.division import gather_whole, local_part

ATTENTION = ("q_proj", "k_proj", "v_proj")


def loaded(path, lora=False):
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if not lora:
        return module
    import peft

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)  # so that B is not zero
    return peft.get_peft_model(module, config)


def by_fsdp(module, mesh, **settings):
    module.to(mesh.device_type)
    for layer in module.get_decoder().layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(module, mesh=mesh, **settings)


def by_tensor(module, mesh, head=None):
    """Attention and MLP by rows and columns, but the MLP of the first layer whole."""
    module.to(mesh.device_type)
    for index, layer in enumerate(module.model.layers):
        plan = {f"self_attn.{name}": ColwiseParallel() for name in ATTENTION}
        plan["self_attn.o_proj"] = RowwiseParallel()
        if index:
            plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
            plan["mlp.down_proj"] = RowwiseParallel()
        parallelize_module(layer, mesh, plan)
    if head is not None:
        parallelize_module(module, mesh, {"lm_head": head})
    return module


def state_of(module):
    """Everything that a gradient pass might leave changed."""
    return [
        module.config._attn_implementation,
        *((name, part.training, "forward" in vars(part)) for name, part in module.named_modules()),
        *(len(part._forward_pre_hooks) for part in module.modules()),
        *((name, p.requires_grad, p.grad is None, local_part(p).sum().item()) for name, p in module.named_parameters()),
    ]


def gathered(factors):
    return tuple(gather_whole(part).cpu() for part in (factors.left, factors.values, factors.right))


@contextmanager
def gathered_numbers():
    """How many numbers of gathered factors exist at once, at most."""
    alive, peak, gathering = WeakValueDictionary(), [0], _taps.start_gathering

    def counted(tensor):
        wait = gathering(tensor)

        def and_count():
            found = wait()
            if found is not tensor:
                found = found.detach()  # gloo's threads let go of the other one some time later
                alive[id(found)] = found
            peak[0] = max(peak[0], sum(one.numel() for one in alive.values()))
            return found

        return and_count

    _taps.start_gathering = counted
    try:
        yield peak
    finally:
        _taps.start_gathering = gathering


def found_in(module, samples, tokenizer, svd=None, **settings):
    """Factors, gradients and bytes of this process, and whether the model is as it was."""
    module.train()
    svd = svd or weight_svd(module)
    before = state_of(module)
    with gathered_numbers() as peak:
        found = per_sample_gradients(samples, module, tokenizer=tokenizer, svd=svd, **settings)
    return {
        "gathered at once": peak[0],
        "gradients": dict(found),
        "factors": {name: gathered(each) for name, each in svd.items()},
        "kept": sum(local_part(part).numel() for each in svd.values() for part in (each.left, each.right)),
        "is as it was": before == state_of(module),
    }


@contextmanager
def recomputing(layers):
    """Have the first layers computed again, as if there were room for no more than the others."""
    planned = _per_sample.plan_in_turns
    _per_sample.plan_in_turns = lambda *given, **how: (planned(*given, **how)[0], layers)
    try:
        yield
    finally:
        _per_sample.plan_in_turns = planned


def refusal(call):
    try:
        call()
    except AssayError as error:
        return str(error)
    return ""


def run(rank, device, paths, tokenizer_path, samples, pairs):
    """Everything that needs two processes, one after the other; return what this one found."""
    mesh = init_device_mesh(device.type, (2,))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    found = {}
    for family, path in paths.items():
        found[f"{family} fsdp"] = found_in(by_fsdp(loaded(path), mesh), samples, tokenizer)
        found[f"{family} tensor"] = found_in(by_tensor(loaded(path), mesh), samples, tokenizer)
    llama, qwen3 = paths["llama"], paths["qwen3"]
    # Batches of one sample, three of them for two processes.
    few = {"max_tokens": 1, "checkpointing": True}
    found["llama fsdp, few"] = found_in(by_fsdp(loaded(llama), mesh), samples[:3], tokenizer, **few)
    found["llama tensor, few"] = found_in(by_tensor(loaded(llama), mesh), samples[:3], tokenizer, **few)
    with recomputing(layers=1):
        found["llama fsdp, one layer again"] = found_in(by_fsdp(loaded(llama), mesh), samples, tokenizer)
    found["llama fsdp, lora"] = found_in(by_fsdp(loaded(llama, lora=True), mesh), samples, tokenizer)
    adapter = DeltaS(loaded(qwen3).to(device))
    inside = by_fsdp(adapter.model, mesh)
    found["qwen3 fsdp, adapter"] = found_in(inside, samples, tokenizer, adapter.svd)
    spread = load_model(qwen3, dtype="float32", device=str(device), mesh=mesh).module
    found["qwen3 transformers"] = found_in(spread, samples, tokenizer)
    divided_head = ColwiseParallel(output_layouts=Replicate())
    found["llama tensor, head"] = found_in(by_tensor(loaded(llama), mesh, divided_head), samples, tokenizer)
    basis = extract(pairs, by_fsdp(loaded(llama), mesh), tokenizer=tokenizer, n_heldout=0, top_k=3)
    found["basis"] = {"axes": basis.axes, "weights": basis.origin.weights}
    found["refused"] = refusals(rank, llama, mesh, samples, tokenizer)
    return found


def refusals(rank, path, mesh, samples, tokenizer):
    """What is said about models and samples of which gradients would not be exact."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    plane = init_device_mesh(mesh.device_type, (2, 1), mesh_dim_names=("shard", "tensor"))
    broken = by_fsdp(loaded(path), mesh)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.to_local()[0, 0] = torch.nan if rank else 0.0

    def gradients(module, chosen=samples):
        return lambda: per_sample_gradients(chosen, module, tokenizer=tokenizer)

    return {
        "half": refusal(gradients(by_fsdp(loaded(path), mesh, mp_policy=half))),
        "plane": refusal(gradients(by_fsdp(loaded(path), plane))),
        "head": refusal(gradients(by_tensor(loaded(path), mesh, ColwiseParallel()))),
        "samples": refusal(gradients(by_fsdp(loaded(path), mesh), samples[rank:])),
        "broken": refusal(gradients(broken)),
        # A file is where the first process would make the directory.
        "cache": refusal(lambda: weight_svd(by_fsdp(loaded(path), mesh), cache=None if rank else path / "config.json")),
    }
