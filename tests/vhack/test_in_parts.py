"""Models in parts have the gradients, factors and basis of the whole model: on a CPU over gloo, on GPUs over NCCL."""

from contextlib import contextmanager
from weakref import WeakValueDictionary

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from assay.errors import AssayError
from assay.models import load_model
from assay.vhack import Factors, SVDCache, extract, per_sample_gradients, target_modules, weight_svd, weights_digest
from assay.vhack.delta import DeltaS
from assay.vhack.gradients import per_sample as _per_sample
from assay.vhack.gradients import taps as _taps
from assay.vhack.gradients.division import Division, gather_whole, local_part
from conftest import SMALL
from tests.vhack.adapter import sequential_gradients, worst_error
from tests.vhack.two_processes import BACKENDS, needs_two, together

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
    again = {"checkpointing": True}
    found["llama fsdp, layers again"] = found_in(by_fsdp(loaded(llama), mesh), samples, tokenizer, **again)
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


@pytest.fixture(scope="module")
def llama_checkpoint(tmp_path_factory):
    """A directory with a small Llama, whose head is not tied and whose heads have biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama") / "small"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(**SMALL | {"tie_word_embeddings": False, "attention_bias": True})
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paths(small_checkpoint, llama_checkpoint):
    return {"qwen3": small_checkpoint, "llama": llama_checkpoint}


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request, paths, byte_tokenizer, samples, small_pairs, tmp_path_factory):
    """What each of two processes found, all cases in one go: starting one takes longer than what it does."""
    folder = tmp_path_factory.mktemp("parts")
    byte_tokenizer.save_pretrained(folder / "tokenizer")
    return together(run, folder, request.param, paths, folder / "tokenizer", samples, small_pairs)


CASES = [
    *(f"{family} {kind}" for family in ("qwen3", "llama") for kind in ("fsdp", "tensor")),
    "llama fsdp, few",
    "llama tensor, few",
    "llama fsdp, layers again",
    "llama tensor, head",
    "llama fsdp, lora",
    "qwen3 fsdp, adapter",
    "qwen3 transformers",
]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_autograd_in_one_process(ranks, paths, byte_tokenizer, samples, case):
    module = loaded(paths[case.split()[0]], lora="lora" in case).eval()
    parts = ranks[0][case]["factors"]
    svd = SVDCache({name: Factors(*each, 0.0, 0.0) for name, each in parts.items()}, rank=None, dtype=torch.float32)
    assert svd.keys() == target_modules(module).keys()
    for name, linear in target_modules(module).items():
        product = (svd[name].left * svd[name].values) @ svd[name].right
        assert (product - linear.weight).norm() < 1e-5 * linear.weight.norm()
    chosen = samples[:3] if "few" in case else samples
    wanted = sequential_gradients(module, byte_tokenizer, chosen, svd)
    for rank in ranks:
        assert worst_error(rank[case]["gradients"], wanted) < 1e-5
        assert rank[case]["is as it was"]


@pytest.mark.parametrize("case", [case for case in CASES if "adapter" not in case])
def test_each_process_keeps_its_share_of_the_factors_and_gathers_those_of_one_matrix_at_most(ranks, paths, case):
    """It keeps half of ``Σ R (O + I)`` numbers; at once it has the fourth line of the formula in docs/vhack.md."""
    shapes = [one.weight.shape for one in target_modules(loaded(paths[case.split()[0]])).values()]
    sizes = [min(shape) * sum(shape) for shape in shapes]
    for rank in ranks:
        assert rank[case]["kept"] == sum(sizes) // 2
        assert min(map(min, shapes)) ** 2 <= rank[case]["gathered at once"] <= max(sizes)


def test_a_basis_of_a_divided_model_is_that_of_the_whole_one(ranks, paths, byte_tokenizer, small_pairs):
    module = loaded(paths["llama"])
    wanted = extract(small_pairs, module, tokenizer=byte_tokenizer, n_heldout=0, top_k=3)
    for rank in ranks:
        assert rank["basis"]["weights"] == weights_digest(module)
        for name, axes_KR in wanted.axes.items():
            cosines = torch.linalg.svdvals(axes_KR.double() @ rank["basis"]["axes"][name].double().T)
            assert cosines.min() > 1 - 1e-4


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "half": "computes in torch.bfloat16",
        "plane": "a mesh of several dimensions",
        "head": "512 tokens gives 256 logits to this process",
        "samples": "other samples in process",
        "broken": "model.layers.1.mlp.up_proj: a weight matrix",
        "cache": "config.json/svd",
    }.items(),
)
def test_what_would_not_be_exact_or_fails_in_one_process_is_refused_by_every_process(ranks, case, words):
    assert all(words in rank["refused"][case] for rank in ranks)


@pytest.fixture
def on_several_devices(monkeypatch):
    """A machine with a CPU alone cannot have two devices: take the way of a model that is on several."""
    monkeypatch.setattr(_per_sample, "division_of", lambda *_: Division(None, by_samples=False))


def test_a_model_with_the_hooks_of_device_map_is_run_itself(
    on_several_devices, llama_checkpoint, byte_tokenizer, samples
):
    from accelerate import dispatch_model

    module = loaded(llama_checkpoint)
    wanted_svd = weight_svd(module)
    wanted = sequential_gradients(module, byte_tokenizer, samples, wanted_svd)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" for index in range(len(module.model.layers))}
    dispatched = dispatch_model(module, places, force_hooks=True)
    assert "forward" in vars(dispatched.model.layers[0])
    found = found_in(dispatched, samples, byte_tokenizer)
    assert worst_error(found["gradients"], wanted) < 1e-5
    assert found["is as it was"]


def test_an_error_in_the_pass_leaves_the_model_as_it_was(on_several_devices, llama_checkpoint, byte_tokenizer, samples):
    module = loaded(llama_checkpoint).train()
    svd, before = weight_svd(module), state_of(module)

    def fail(*_):
        raise RuntimeError("in the middle of a pass")

    handle = module.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        per_sample_gradients(samples, module, tokenizer=byte_tokenizer, svd=svd)
    handle.remove()
    assert state_of(module) == before


@pytest.mark.gpu
@needs_two
def test_a_model_on_two_gpus_has_the_gradients_of_one(llama_checkpoint, byte_tokenizer, samples):
    from accelerate import dispatch_model

    module = loaded(llama_checkpoint)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": 1 for index in range(1, len(module.model.layers))}
    dispatched = dispatch_model(module, places)
    svd = weight_svd(dispatched)
    assert {factors.left.device.index for factors in svd.values()} == {0, 1}
    found = per_sample_gradients(samples, dispatched, tokenizer=byte_tokenizer, svd=svd)
    on_cpu = {
        name: Factors(each.left.cpu(), each.values.cpu(), each.right.cpu(), 0.0, 0.0) for name, each in svd.items()
    }
    wanted = sequential_gradients(loaded(llama_checkpoint).eval(), byte_tokenizer, samples, on_cpu)
    assert worst_error(found, wanted) < 1e-5
