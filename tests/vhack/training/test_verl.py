"""verl's own worker takes the steps of a plain loop with the same δS, axes, gate and loss: two processes on a CPU."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed; docs/vhack-training.md says how this is run")

from assay.errors import UsageError
from assay.models import load_model
from assay.vhack import extract, weight_svd
from assay.vhack.delta import DeltaS, ProjectedOptimizer, arm_named
from assay.vhack.pairs import read_pairs, write_pairs
from tests.vhack.training import verl_worker as theirs

# verl warns of its engines that are not installed.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
MINE = """
from assay.vhack.training.verl import train_delta

train_delta({pairs!r}, arm={arm!r}, k_use=2, method="svd")
"""
CLIP_RATIO, DUAL_CLIP = 0.2, 3.0  # defaults of verl


def logps_of(module):
    logits = module(input_ids=theirs.ROWS, use_cache=False).logits[:, theirs.PROMPT - 1 : -1]
    return logits.log_softmax(dim=-1).gather(2, theirs.ROWS[:, theirs.PROMPT :, None])[..., 0]


def loss_of(logps, old):
    """verl's vanilla policy loss, mean over tokens."""
    advantages = theirs.ADVANTAGES[:, None]
    ratio = (logps - old).exp()
    worst = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO))
    return torch.where(advantages < 0, torch.minimum(worst, -advantages * DUAL_CLIP), worst).mean()


def alone(checkpoint, pairs):
    """A model with δS at its displaced start, in this process."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    svd = weight_svd(model)
    basis = extract(pairs, model, svd=svd, n_heldout=0, top_k=2, method="svd")
    adapter = DeltaS(model, svd)
    inner = torch.optim.AdamW(adapter.delta, lr=theirs.LR, weight_decay=0.0)
    optimizer = ProjectedOptimizer(inner, adapter, basis, arm=arm_named(theirs.ARM), max_norm=theirs.CLIP)
    return model.module, adapter, optimizer, basis


@pytest.fixture(scope="module")
def steps(checkpoint, pairs, tmp_path_factory):
    """What each of two processes found, and what this one does by itself."""
    folder = tmp_path_factory.mktemp("verl")
    write_pairs(folder / "pairs.jsonl", pairs)
    (folder / "mine_verl.py").write_text(MINE.format(pairs=str(folder / "pairs.jsonl"), arm=theirs.ARM))
    module, adapter, optimizer, basis = alone(checkpoint, read_pairs(folder / "pairs.jsonl"))
    with torch.no_grad():
        old = logps_of(module)
        with adapter.disabled():
            reference = module(input_ids=theirs.ROWS, use_cache=False).logits
    torch.save(old, folder / "old.pt")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=theirs.run, args=(rank, checkpoint, folder)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(280)
    finally:
        for rank in ranks:
            rank.kill()
    mine = {"reference": reference, "start": theirs.copied(adapter), "basis": basis.axes, "norms": [], "measures": []}
    for _ in range(theirs.STEPS):
        optimizer.zero_grad()
        loss_of(logps_of(module), old).backward()
        mine["norms"].append(float(torch.cat([parameter.grad.flatten() for parameter in adapter.delta]).norm()))
        optimizer.step()
        mine["measures"].append(optimizer.measures.as_dict())
    mine |= {"delta": theirs.copied(adapter), "handed": dict(adapter.weights())}
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], mine, folder


@pytest.mark.timeout(600)
def test_its_worker_takes_the_steps_of_a_plain_loop(steps):
    found, mine, _ = steps
    for theirs_found in found:
        assert theirs_found["norms"] == pytest.approx(mine["norms"], rel=1e-3)
        for part, slack in (("start", 1e-6), ("basis", 1e-6), ("delta", 2e-5), ("handed", 2e-5)):
            assert theirs_found[part].keys() == mine[part].keys()
            for name, value in mine[part].items():
                torch.testing.assert_close(theirs_found[part][name], value, rtol=1e-3, atol=slack)
        torch.testing.assert_close(theirs_found["reference"], mine["reference"], rtol=1e-4, atol=1e-4)
    moved = max(float((value - mine["start"][name]).abs().max()) for name, value in mine["delta"].items())
    assert moved > 0.01


def test_the_gate_holds_what_the_start_has_displaced(steps):
    found, mine, _ = steps
    for measures, wanted in zip(found[0]["measures"], mine["measures"], strict=True):
        assert measures == pytest.approx(wanted, rel=1e-2, abs=1e-4)
        assert measures["leak_two_sided"] < 1e-6
        assert measures["cin_two_sided"] > 0.01


def test_a_checkpoint_has_the_delta_in_a_file_of_its_own(steps, checkpoint, pairs):
    found, _, folder = steps
    _, adapter, _, _ = alone(checkpoint, pairs)
    adapter.load(folder / "checkpoint" / "delta.safetensors")
    for name, value in adapter.values().items():
        assert torch.equal(value, found[0]["saved"][name])


def test_arms_that_need_more_than_axes_are_refused(pairs):
    from assay.vhack.training.verl import train_delta

    for arm in ("none:random", "advantage-modification", "erase-gradient:random"):
        with pytest.raises(UsageError, match="arm"):
            train_delta(pairs, arm=arm)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("engine_config", "model_dtype", "bf16"),
        ("engine_config", "mixed_precision", None),  # verl then computes in bfloat16
        ("engine_config", "param_offload", True),
        ("engine_config", "offload_policy", True),
        ("engine_config", "ulysses_sequence_parallel_size", 2),
        ("model_config", "lora_rank", 8),
    ],
)
def test_settings_that_it_was_never_run_with_are_refused(part, name, value):
    from assay.vhack.training.verl import _check

    config = {"model_dtype": "fp32", "mixed_precision": {"param_dtype": "fp32"}, "param_offload": False}
    config |= {"optimizer_offload": False, "offload_policy": False, "ulysses_sequence_parallel_size": 1}
    engine = SimpleNamespace(engine_config=SimpleNamespace(**config), model_config=SimpleNamespace(lora_rank=0))
    _check(engine)
    setattr(getattr(engine, part), name, value)
    with pytest.raises(UsageError, match="param_dtype=bf16" if name == "mixed_precision" else f"{name}={value}"):
        _check(engine)
