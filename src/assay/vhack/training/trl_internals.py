"""The one module that uses private names of TRL, with the reason for each.

TRL 1.16 offers reward functions, callbacks and a ``rollout_func``. Nothing public stands between
the rewards of all functions and the advantages, where a rollout can be left out of its group's
baseline: a reward function cannot take back what others pay. Values can be logged from reward
functions alone, one process at a time. What a rollout is marked as has to travel with it through
TRL's shuffled batches. And with vLLM, TRL sends every parameter, of adapters that vLLM does not
know too. So these private names are used:

- ``GRPOTrainer._calculate_rewards`` by :func:`intercept_rewards`;
- ``GRPOTrainer._generate_and_score_completions`` by :func:`train_blocks`;
- ``GRPOTrainer._metrics`` by :func:`log_values`;
- ``VLLMGeneration._iter_named_params`` and ``_fix_param_name_to_vllm`` by :func:`sync_merged`.

Tests run them with the TRL that is installed. :class:`assay.vhack.training.grpo.GRPO` is a subclass
and says at its head what it overrides.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.directions.delta.adapter import DeltaS
from assay.vhack.training.lora_blocks import LoraBlocks

TRL_VERSIONS = "1.16"
"""Versions of TRL in which these names were seen."""

_REWARDS = "_calculate_rewards"
_GENERATE = "_generate_and_score_completions"
_KINDS = "vhack_kinds"
_SCALE = "vhack_scale"

Intercept = Callable[[Tensor, Any, Any, Any], Tensor]
"""Takes rewards of all processes, [B, F] by function, prompts, completions and the tokens of these;
returns rewards."""


def intercept_rewards(trainer: Any, act: Intercept) -> Callable[[], None]:
    """Let a function change the rewards of every batch, and return what takes it out again.

    Raises:
        UsageError: The trainer has no such method.
    """
    plain = getattr(trainer, _REWARDS, None)
    if plain is None or not hasattr(trainer, "_metrics"):
        raise UsageError(
            f"{type(trainer).__name__} without {_REWARDS} or _metrics",
            wanted=f"a GRPOTrainer as in TRL {TRL_VERSIONS}",
            do="install that version",
        )
    before = vars(trainer).get(_REWARDS)

    def calculate(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_BF = plain(inputs, prompts, completions, completion_ids_list)
        return act(rewards_BF, prompts, completions, completion_ids_list)

    def restore() -> None:
        if vars(trainer).get(_REWARDS) is not calculate:
            raise UsageError(
                "rewards that something else has intercepted since",
                wanted="the last interception",
                do="undo that one first",
            )
        delattr(trainer, _REWARDS)
        if before is not None:
            setattr(trainer, _REWARDS, before)

    setattr(trainer, _REWARDS, calculate)
    return restore


def train_blocks(
    trainer: Any,
    blocks: LoraBlocks,
    marks: Callable[[], tuple[Tensor, Tensor]],
    turn: Callable[[], int],
) -> Callable[[], None]:
    """Let each rollout train the LoRA blocks of its kind, and return what takes that out again.

    Args:
        trainer: Trainer of a model with these blocks.
        blocks: The blocks.
        marks: What returns the kind of each rollout of this process's last batch, and what to add
            to its advantage.
        turn: What returns how many batches the run had before, those of its checkpoint included.
    """
    plain_generate = getattr(trainer, _GENERATE)
    plain_loss = trainer.compute_loss

    def generate(inputs: Any) -> dict[str, Any]:
        blocks.kinds = None
        is_training = trainer.model.training
        # Evaluations see what is left in the end; otherwise both write in every second batch.
        blocks.scale = 1.0 - turn() % 2 if is_training else 0.0
        batch: dict[str, Any] = plain_generate(inputs)
        if is_training:
            kinds_B, shift_B = marks()
            advantages_B = batch["advantages"]
            batch["advantages"] = advantages_B + shift_B.to(advantages_B)
            # TRL shuffles and splits tensors of a batch together.
            batch[_KINDS] = kinds_B.to(advantages_B.device)
            # An evaluation may come before all of a batch is learnt from.
            batch[_SCALE] = torch.full_like(advantages_B, blocks.scale)
        return batch

    def compute_loss(model: Any, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        blocks.kinds = inputs.get(_KINDS)
        blocks.scale = float(inputs[_SCALE][0]) if _SCALE in inputs else 0.0
        return plain_loss(model, inputs, *others, **options)

    setattr(trainer, _GENERATE, generate)
    trainer.compute_loss = compute_loss

    def restore() -> None:
        delattr(trainer, _GENERATE)
        del trainer.compute_loss
        blocks.detach()

    return restore


def log_values(trainer: Any, values: Mapping[str, float]) -> None:
    """Give TRL's next log call these numbers, as ``vhack/NAME``; trackers get them from there."""
    for name, value in values.items():
        trainer._metrics["train"][f"vhack/{name}"].append(value)


def sync_merged(trainer: Any, adapter: DeltaS) -> None:
    """Let a trainer with ``use_vllm`` send the merged weights of :meth:`DeltaS.weights`.

    By itself TRL sends every parameter, those of δS too, which vLLM does not know. In one process
    it loads every weight by itself: 0.19 s instead of 0.017 s with 310 weights on an H200
    (research/results/vhack_vllm_h200.json, ``sections``).

    Args:
        trainer: Trainer whose ``vllm_generation`` is there.
        adapter: Adapter of its model.

    Raises:
        UsageError: The trainer does not generate with vLLM.
    """
    generation: Any = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise UsageError(
            f"{type(trainer).__name__} without vLLM",
            wanted="one with use_vllm=True",
            do="leave sync_merged out",
        )

    def named_weights() -> Iterator[tuple[str, Tensor]]:
        for name, weight in adapter.weights():
            yield generation._fix_param_name_to_vllm(name), weight

    def load_weights() -> Iterator[tuple[str, Tensor]]:
        """Load all weights at once, and leave TRL none to load one by one."""
        executor = generation.llm.llm_engine.model_executor
        executor.driver_worker.model_runner.model.load_weights(named_weights())
        return iter(())

    is_colocated = generation.mode == "colocate"
    generation._iter_named_params = load_weights if is_colocated else named_weights
