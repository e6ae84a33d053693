"""Models in parts have the gradients, factors and basis of the whole model: on a CPU over gloo, on GPUs over NCCL."""

import pytest
import torch

from assay.vhack import Factors, SVDCache, extract, per_sample_gradients, target_modules, weight_svd, weights_digest
from assay.vhack.gradients import per_sample as _per_sample
from assay.vhack.gradients.division import Division
from conftest import SMALL
from tests.vhack import in_parts
from tests.vhack.adapter import sequential_gradients, worst_error
from tests.vhack.two_processes import BACKENDS, needs_two, together


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
    return together(in_parts.run, folder, request.param, paths, folder / "tokenizer", samples, small_pairs)


CASES = [
    *(f"{family} {kind}" for family in ("qwen3", "llama") for kind in ("fsdp", "tensor")),
    "llama fsdp, few",
    "llama tensor, few",
    "llama fsdp, one layer again",
    "llama tensor, head",
    "llama fsdp, lora",
    "qwen3 fsdp, adapter",
    "qwen3 transformers",
]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_autograd_in_one_process(ranks, paths, byte_tokenizer, samples, case):
    module = in_parts.loaded(paths[case.split()[0]], lora="lora" in case).eval()
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


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_as_it_was(ranks, case):
    assert all(rank[case]["is as it was"] for rank in ranks)


@pytest.mark.parametrize("case", [case for case in CASES if "adapter" not in case])
def test_each_process_keeps_its_share_of_the_factors(ranks, paths, case):
    """Half of ``Σ R (O + I)`` numbers, as docs/vhack.md counts them, whatever the weights are divided by."""
    module = in_parts.loaded(paths[case.split()[0]])
    whole = sum(min(one.weight.shape) * sum(one.weight.shape) for one in target_modules(module).values())
    assert [rank[case]["kept"] for rank in ranks] == [whole // 2, whole // 2]


@pytest.mark.parametrize("case", [case for case in CASES if "adapter" not in case])
def test_factors_of_one_matrix_at_most_are_gathered_at_once(ranks, paths, case):
    """The fourth line of the formula in docs/vhack.md, which is for U and Vh."""
    module = in_parts.loaded(paths[case.split()[0]])
    shapes = [one.weight.shape for one in target_modules(module).values()]
    for rank in ranks:
        assert min(map(min, shapes)) ** 2 <= rank[case]["gathered at once"]
        assert rank[case]["gathered at once"] <= max(min(shape) * sum(shape) for shape in shapes)


def test_a_basis_of_a_divided_model_is_that_of_the_whole_one(ranks, paths, byte_tokenizer, small_pairs):
    module = in_parts.loaded(paths["llama"])
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

    module = in_parts.loaded(llama_checkpoint)
    wanted_svd = weight_svd(module)
    wanted = sequential_gradients(module, byte_tokenizer, samples, wanted_svd)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" for index in range(len(module.model.layers))}
    dispatched = dispatch_model(module, places, force_hooks=True)
    assert "forward" in vars(dispatched.model.layers[0])
    found = in_parts.found_in(dispatched, samples, byte_tokenizer)
    assert worst_error(found["gradients"], wanted) < 1e-5
    assert found["is as it was"]


def test_an_error_in_the_pass_leaves_the_model_as_it_was(on_several_devices, llama_checkpoint, byte_tokenizer, samples):
    module = in_parts.loaded(llama_checkpoint).train()
    svd, before = weight_svd(module), in_parts.state_of(module)

    def fail(*_):
        raise RuntimeError("in the middle of a pass")

    handle = module.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        per_sample_gradients(samples, module, tokenizer=byte_tokenizer, svd=svd)
    handle.remove()
    assert in_parts.state_of(module) == before


@pytest.mark.gpu
@needs_two
def test_a_model_on_two_gpus_has_the_gradients_of_one(llama_checkpoint, byte_tokenizer, samples):
    from accelerate import dispatch_model

    module = in_parts.loaded(llama_checkpoint)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": 1 for index in range(1, len(module.model.layers))}
    dispatched = dispatch_model(module, places)
    svd = weight_svd(dispatched)
    assert {factors.left.device.index for factors in svd.values()} == {0, 1}
    found = per_sample_gradients(samples, dispatched, tokenizer=byte_tokenizer, svd=svd)
    on_cpu = {
        name: Factors(each.left.cpu(), each.values.cpu(), each.right.cpu(), 0.0, 0.0) for name, each in svd.items()
    }
    wanted = sequential_gradients(in_parts.loaded(llama_checkpoint).eval(), byte_tokenizer, samples, on_cpu)
    assert worst_error(found, wanted) < 1e-5
