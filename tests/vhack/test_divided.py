"""Divided models have the factors, gradients, basis and digest of the whole one: FSDP2 and tensor
parallelism in two processes, device_map in one.
"""

import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from assay.errors import AssayError, DataError, ModelError, OutOfMemory
from assay.models import load_model
from assay.vhack import extract, per_sample_gradients, target_modules, weight_svd, weights_digest
from assay.vhack.detectors import fit_judge
from assay.vhack.pairs import generate_pairs
from tests.usual import SOAK, enough
from tests.vhack.adapter import made
from tests.vhack.conftest import bytewise
from tests.vhack.two_processes import BACKENDS, together

REFERENCES = ("reference:qwen3", "reference:llama")
MODELS = (*REFERENCES, "smollm2")
ROOT = Path(__file__).parents[2]
PAIRS = generate_pairs(4)
pytestmark = pytest.mark.timeout(900)


def loaded(name, device="cpu"):
    """A model in float32; the third has SmolLM2's proportions in small."""
    if name == "smollm2":
        sizes = {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "head_dim": 16,
            "vocab_size": 512,
            "max_position_embeddings": 1024,
        }
        return made("Llama", **sizes, tie_word_embeddings=True, intermediate_size=256).to(device)
    return load_model(name, dtype="float32", device=str(device)).module


def by_fsdp(module, mesh):
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def by_tensor(module, mesh, head=None):
    """Attention and MLP by rows and columns, but the MLP of the first layer whole."""
    for index, layer in enumerate(module.model.layers):
        plan = {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan["self_attn.o_proj"] = RowwiseParallel()
        if index:
            plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
            plan["mlp.down_proj"] = RowwiseParallel()
        parallelize_module(layer, mesh, plan)
    if head is not None:
        parallelize_module(module, mesh, {"lm_head": head})
    return module


def by_transformers(module, mesh):
    """By the plan that transformers has for the layers; a tied head stays with the embeddings."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    module._tp_plan = {name: way for name, way in module.tp_plan.items() if "layers" in name}
    return apply_tensor_parallelism(module, mesh)


WAYS = {"fsdp": by_fsdp, "tensor": by_tensor, "transformers": by_transformers}
CASES = tuple(product(MODELS, WAYS))
ENOUGH = (
    *(("smollm2", way) for way in WAYS),
    ("reference:qwen3", "tensor"),  # norms of heads
    ("reference:llama", "fsdp"),  # a head of its own
)
"""Models and ways, of which the others show nothing more."""


def state_of(module):
    """Everything that a gradient pass might leave changed."""
    return [
        *((name, part.training, "forward" in vars(part)) for name, part in module.named_modules()),
        *(len(part._forward_hooks) for part in module.modules()),
        *((name, part.requires_grad, part.grad) for name, part in module.named_parameters()),
    ]


def computed(module, samples, **settings):
    """Digest, gradients and a basis of a model, and whether it is as it was."""
    module.train()
    before = state_of(module)
    svd = weight_svd(module)
    rows = per_sample_gradients(samples, module, tokenizer=bytewise(), svd=svd, **settings)
    return {
        "digest": weights_digest(module),
        "gradients": dict(rows),
        "factors": list(svd),
        "as it was": before == state_of(module),
    }


def run(rank, device, samples):
    """Everything that needs two processes; return what this one found."""
    mesh = init_device_mesh(device.type, (2,))
    results = {}
    for name, way in CASES if SOAK else ENOUGH:
        results[f"{name} {way}"] = computed(WAYS[way](loaded(name, device), mesh), samples)
    small = by_fsdp(loaded("smollm2", device), mesh)
    few = {"checkpointing": True, "max_tokens": 60}
    results["smollm2 fsdp, few"] = computed(small, samples, **few)
    basis = extract(PAIRS, small, tokenizer=bytewise(), n_heldout=0, top_k=2, rank=8)
    results["basis"] = {"axes": basis.axes, "weights": basis.origin.weights}
    judge = fit_judge(generate_pairs(6), small, detector="cin-lda", tokenizer=bytewise())
    results["scores"] = torch.tensor(judge.scores(samples[rank : rank + 2 + rank]))
    other = partial(per_sample_gradients, samples[rank:], small, tokenizer=bytewise())
    results["refused"] = [
        is_refused(other, DataError),
    ]
    parted = by_tensor(loaded("reference:llama", device), mesh, ColwiseParallel())
    gradients = partial(per_sample_gradients, samples, parted, tokenizer=bytewise())
    results["refused"].append(is_refused(gradients, ModelError))
    small.register_forward_pre_hook(refuse_batches, with_kwargs=True)
    gradients = partial(per_sample_gradients, samples, small, tokenizer=bytewise())
    results["refused"].append(is_refused(gradients, OutOfMemory))
    return results


def refuse_batches(_, arguments, keywords):
    """Run out of memory with more than one sample."""
    if len(keywords["input_ids"]) > 1:
        raise torch.OutOfMemoryError


def is_refused(work, kind):
    try:
        work()
    except AssayError as error:
        return isinstance(error, kind) and bool(error.seen and error.wanted and error.do)
    return False


@pytest.fixture(scope="module", params=[pytest.param("gloo", marks=pytest.mark.slow), BACKENDS[1]])
def ranks(request, samples, tmp_path_factory):
    return together(run, tmp_path_factory.mktemp("divided"), request.param, samples)


@pytest.fixture(scope="module")
def whole(samples):
    """What the models give that are whole, by name."""
    return {name: computed(loaded(name), samples) for name in MODELS}


def check_equal(result, wanted):
    """Compare gradients, module by module, and the digest of the weights."""
    assert result["as it was"]
    assert result["digest"] == wanted["digest"]
    assert result["gradients"].keys() == wanted["gradients"].keys()
    for name, rows_NR in wanted["gradients"].items():
        # Singular vectors have either sign, and the gradient does not depend on it.
        error = (result["gradients"][name] - rows_NR).norm()
        assert error <= 1e-4 * rows_NR.norm(), name


@pytest.mark.parametrize("case", enough(CASES, *ENOUGH), ids="-".join)
def test_gradients_and_digest_are_those_of_the_whole_model(ranks, whole, case):
    name, way = case
    for rank in ranks:
        check_equal(rank[f"{name} {way}"], whole[name])


def test_each_process_keeps_the_factors_of_its_share(ranks, whole):
    for case in (case for case in ranks[0] if case.endswith(tuple(WAYS))):
        first, second = (set(rank[case]["factors"]) for rank in ranks)
        assert not first & second
        assert first | second == set(whole[case.split()[0]]["factors"])
        assert abs(len(first) - len(second)) <= 1


def test_layers_that_are_computed_again_give_equal_gradients(ranks, whole):
    check_equal(ranks[1]["smollm2 fsdp, few"], whole["smollm2"])


def test_a_basis_is_that_of_the_whole_model(ranks):
    module = loaded("smollm2")
    wanted = extract(PAIRS, module, tokenizer=bytewise(), n_heldout=0, top_k=2, rank=8)
    for rank in ranks:
        assert rank["basis"]["weights"] == wanted.origin.weights
        for name, axes_KR in wanted.axes.items():
            cosines = (axes_KR * rank["basis"]["axes"][name]).sum(dim=1).abs()
            assert cosines.min() > 1 - 1e-3, name


def test_processes_judge_rollouts_of_their_own(ranks, samples):
    module = loaded("smollm2")
    judge = fit_judge(generate_pairs(6), module, detector="cin-lda", tokenizer=bytewise())
    for rank, result in enumerate(ranks):
        wanted = judge.scores(samples[rank : rank + 2 + rank])
        assert result["scores"].tolist() == pytest.approx(wanted, rel=1e-3)


def test_other_samples_a_parted_head_and_too_large_a_batch_are_refused_by_every_process(ranks):
    assert [rank["refused"] for rank in ranks] == [[True] * 3] * 2


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", enough(MODELS, "smollm2"))
def test_a_model_under_device_map_has_the_gradients_of_the_whole_one(
    name, place, whole, samples, tmp_path
):
    from accelerate import dispatch_model

    module = loaded(name)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.norm": place}
    for index in range(len(module.model.layers)):
        places[f"model.layers.{index}"] = place if index % 2 else "cpu"
    settings = {"main_device": "cpu", "offload_dir": tmp_path, "force_hooks": True}
    dispatched = dispatch_model(module, places, **settings)
    assert (place == "disk") == any(part.is_meta for part in dispatched.parameters())
    check_equal(computed(dispatched, samples), whole[name])
    check_equal(computed(dispatched, samples, checkpointing=True), whole[name])


def test_weights_without_memory_are_refused():
    with torch.device("meta"):
        module = loaded("smollm2", "meta")
    with pytest.raises(ModelError):
        weight_svd(module)
    assert target_modules(module)


def test_flat_parameters_are_refused_in_three_parts():
    """FSDP1 itself cannot be made without an accelerator."""
    flat = loaded("smollm2")
    flat.model.layers[0].__class__ = type(
        "Flat", (FullyShardedDataParallel,), {"_fsdp_wrapped_module": None}
    )
    zero = loaded("smollm2")
    zero.model.layers[0].mlp.up_proj.weight.ds_id = 0
    for module in (flat, zero):
        assert is_refused(partial(weight_svd, module), ModelError)
        assert is_refused(partial(weights_digest, module), ModelError)


@pytest.mark.slow
def test_the_page_s_program_runs_in_two_processes(tmp_path):
    page = (ROOT / "docs/vhack.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(# torchrun.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "divided.py").write_text(program + "print(len(basis.axes))\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--standalone", str(tmp_path / "divided.py")]
    where = {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    printed = subprocess.check_output([*launch, *options], env=os.environ | where, text=True)
    modules = len(target_modules(loaded("reference:qwen3")))
    # Without spaces: a process may write its number before the other has ended its line.
    assert "".join(printed.split()) == str(modules) * 2
