"""Train δS with TRL's GRPO and a configuration of your own, measured along hack directions.

    python examples/own_trainer.py RUN

Needs the extra `train`. RUN gets a log with a line per step, checkpoints and delta.safetensors; the
same command goes on after the last whole checkpoint. The sizes are those of a trial: raise
`max_steps`, `num_generations` and `max_completion_length` for a run that learns something.
"""

import sys
from pathlib import Path

import torch
from trl import GRPOConfig

import assay
from assay.vhack import extract, weight_svd
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer, arm_named
from assay.vhack.pairs.generate import environment_pairs
from assay.vhack.training import OwnReward, TrainLog
from assay.vhack.training.grpo import GRPO, last_checkpoint
from assay.vhack.training.step_log import StepLog


def tasks() -> list[dict[str, str]]:
    """Return prompts, and what the reward needs to know of each."""
    return [{"prompt": f"{a} + {b} =", "answer": f"{a + b}"} for a in range(10) for b in range(10)]


def reward(
    prompts: list[str], completions: list[str], answer: list[str], **_: object
) -> list[float]:
    """Pay completions that say the answer, and short ones a little more, as TRL's rewards do."""
    return [
        float(text.strip() == right) - len(text) / 1000
        for text, right in zip(completions, answer, strict=True)
    ]


def main(folder: Path) -> None:
    """Extract axes from pairs, attach δS, and train it."""
    model = assay.load_model("reference:organism", dtype="float32", device="cpu")
    svd = weight_svd(model)
    basis = extract(environment_pairs(12, whole=True), model, svd=svd).slice(5)

    adapter = DeltaS(model, svd)
    inner = torch.optim.AdamW(adapter.delta, lr=0.015)
    arm = arm_named("none")
    optimizer = ProjectedOptimizer(inner, adapter, basis, arm=arm, max_norm=1.0)

    config = GRPOConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=16,
        save_steps=1,
        use_cpu=True,
        bf16=False,
        max_grad_norm=0.0,  # the optimizer clips
        shuffle_dataset=False,  # the trainer has an order that a continued run can take up
    )
    trainer = GRPO(
        adapter,
        optimizer,
        OwnReward(tasks(), reward, optimizer.arm),
        config,
        prompts=4,
        processing_class=model.tokenizer,
        axes=basis,
    )
    checkpoint, done = last_checkpoint(folder)
    log = TrainLog(folder / "log.jsonl", {}, step=done)
    trainer.add_callback(StepLog(trainer, log, console=print))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    adapter.save(folder / "delta.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
