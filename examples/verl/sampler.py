"""What the process of verl's trainer imports: advantages without flagged rollouts, and the log."""

from typing import Any

import transfer_queue
from verl.trainer.ppo.core_algos import register_adv_est
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from assay.vhack.training.verl import JudgedLog, unflagged_advantages

register_adv_est("grpo_unflagged")(unflagged_advantages)


class LoggedBuffer(ReplayBuffer):
    """verl's replay buffer with a log of what is flagged; the options of both are its own."""

    def __init__(self, sampler_kwargs: dict[str, str], **options: Any) -> None:
        super().__init__(sampler_kwargs=sampler_kwargs, **options)
        self.log = JudgedLog(**sampler_kwargs)

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        """Return verl's batch, and its metrics with `vhack/flagged` and the other rates."""
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id != "train":
            return batch, metrics
        fields = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=partition_id, select_fields=["extra_fields"]
        )
        told = [getattr(one, "data", one)["reward_extra_info"] for one in fields["extra_fields"]]
        return batch, metrics | self.log.see(global_steps, told)
