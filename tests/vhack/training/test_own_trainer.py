"""A script with a GRPOConfig of one's own, as docs/vhack-training.md has it: log, sources, pool and resume."""

import pytest
import torch
from trl import GRPOConfig

from assay.errors import UsageError
from assay.models import load_model
from assay.vhack import extract, weight_svd
from assay.vhack.delta import DeltaS, ProjectedOptimizer, arm_named
from assay.vhack.training import OwnReward, TrainLog
from assay.vhack.training.grpo import GRPO, last_checkpoint
from assay.vhack.training.log import StepLog, read_records, read_steps
from assay.vhack.training.pool import PoolRollout, RolloutPool

TASKS = [{"prompt": f"{a} + 1 =", "answer": a + 1} for a in range(4)]


def pay(prompts, completions, answer, **_):
    return [{"reward": len(text) / 10, "exploited": len(text) % 2 == 0} for text in completions]


def configured(folder, steps, **changes):
    wanted = {"max_grad_norm": 0.0, "shuffle_dataset": False, "bf16": False, "use_cpu": True, "report_to": "none"}
    wanted["lr_scheduler_type"] = "constant"  # what decays until the last step changes with their number
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "save_steps": 1}
    return GRPOConfig(str(folder), max_steps=steps, learning_rate=0.02, disable_tqdm=True, **wanted | sizes | changes)


class Mine(GRPO):
    """A trainer of one's own: longer completions are paid a little less."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        paid = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return paid - 0.001 * torch.tensor([[float(len(ids))] for ids in completion_ids_list], device=paid.device)


def script(checkpoint, pairs, folder, steps):
    """What a user writes; called again it goes on."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    svd = weight_svd(model)
    basis = extract(pairs, model, svd=svd, method="svd", n_heldout=0, top_k=2)
    adapter = DeltaS(model, svd)
    inner = torch.optim.AdamW(adapter.delta, lr=0.02)
    optimizer = ProjectedOptimizer(inner, adapter, basis, arm=arm_named("erase-update"), max_norm=1.0)
    ids = model.tokenizer("five")["input_ids"]
    pool = RolloutPool([PoolRollout(one["prompt"], "five", tuple(ids), (-5.5,) * len(ids)) for one in TASKS])
    trainer = Mine(
        adapter,
        optimizer,
        OwnReward(TASKS, pay, optimizer.arm),
        configured(folder, steps),
        prompts=steps,
        processing_class=model.tokenizer,
        pool=pool,
        teachers=1,
        axes=(basis, None),
    )
    found, done = last_checkpoint(folder)
    folder.mkdir(exist_ok=True)
    trainer.add_callback(StepLog(trainer, TrainLog(folder / "log.jsonl", {}, step=done)))
    trainer.train(resume_from_checkpoint=found and str(found))
    return adapter.values(), done


def test_it_logs_its_sources_and_goes_on_as_if_never_stopped(checkpoint, pairs, tmp_path):
    straight, _ = script(checkpoint, pairs, tmp_path / "straight", 4)
    script(checkpoint, pairs, tmp_path / "stopped", 2)
    stopped, done = script(checkpoint, pairs, tmp_path / "stopped", 4)
    assert done == 2
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    assert any(delta.any() for delta in straight.values())
    _, steps = read_steps(tmp_path / "stopped" / "log.jsonl")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert all((step["rollouts"], step["rollouts_teacher"], step["hack_teacher"]) == (3, 1, 1.0) for step in steps)
    sources = {line["source"] for line in read_records(tmp_path / "stopped" / "log.jsonl") if line["kind"] == "source"}
    assert {"student", "teacher"} <= sources


@pytest.mark.parametrize("changes", [{"max_grad_norm": 1.0}, {"shuffle_dataset": True}, {"bf16": True}], ids=str)
def test_settings_of_trl_that_would_undo_the_gate_are_refused(checkpoint, tmp_path, changes):
    model = load_model(checkpoint, dtype="float32", device="cpu")
    adapter = DeltaS(model)
    optimizer = ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.1), adapter, None)
    reward, config = OwnReward(TASKS, pay, optimizer.arm), configured(tmp_path, 1, **changes)
    with pytest.raises(UsageError, match=rf"GRPOConfig\({next(iter(changes))}="):
        GRPO(adapter, optimizer, reward, config, prompts=1, processing_class=model.tokenizer)
