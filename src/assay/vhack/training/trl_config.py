"""The settings of a run in the form that TRL takes."""

from pathlib import Path
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from assay.errors import UsageError
from assay.models.model import Model
from assay.vhack.training.processes import ALONE, Processes
from assay.vhack.training.settings import TrainSettings


def trl_arguments(
    settings: TrainSettings,
    model: Model,
    folder: Path,
    trackers: tuple[str, ...],
    processes: Processes = ALONE,
) -> GRPOConfig:
    """Return the settings in the form that TRL takes.

    Raises:
        UsageError: The model is not on the device that TRL trains on, or a step cannot be shared by
            the processes.
    """
    rollouts = settings.prompts * settings.group
    at_once = settings.rollouts_per_backward * processes.count
    if rollouts % at_once:
        raise UsageError(
            f"{rollouts} rollouts a step, {settings.rollouts_per_backward} a backward pass, "
            f"{processes.count} processes",
            wanted="as many backward passes in every process",
            do=f"choose --prompts, --group and --micro-batch so that {at_once} divides the "
            f"rollouts",
        )
    on_gpu = model.device.type == "cuda"
    config = GRPOConfig(
        output_dir=str(folder),
        seed=settings.seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rollouts_per_backward,
        gradient_accumulation_steps=rollouts // at_once,
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.beta,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # the optimizer clips, behind its gate
        logging_steps=1,
        shuffle_dataset=False,  # the prompts have their order already
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
        bf16=False,  # the model computes in its own dtype, and δS is float32
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,  # δS of every module takes part in every pass
        **_checkpointing(settings.checkpointing),
    )
    trained_on = (config.device.type, config.device.index or 0)
    if trained_on != (model.device.type, model.device.index or 0):
        raise UsageError(
            f"a model on {model.device}",
            wanted=f"{config.device}, where TRL trains",
            do="set CUDA_VISIBLE_DEVICES",
        )
    if not on_gpu:
        # In several processes accelerate says cpu:0, to which torch loads no checkpoint.
        vars(config)["_setup_devices"] = model.device
    # This run does not use other visible devices.
    config._n_gpu = 1
    return config


def _checkpointing(is_on: bool) -> dict[str, Any]:
    """Return TRL's settings of gradient checkpointing."""
    # transformers 5.24 renamed them.
    has_new_name = hasattr(GRPOConfig, "activation_checkpointing")
    name = "activation_checkpointing" if has_new_name else "gradient_checkpointing"
    return {name: is_on, f"{name}_kwargs": {"use_reentrant": False}}
