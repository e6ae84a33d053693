"""What each of two processes does in the test of verl: its own worker, on a CPU; a module of its own, as it is spawned.

verl has no platform for a CPU, so one is added by its interface for plugins.
"""

import os
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

ARM = "displaced-0.1+erase-update-two-sided"
LR, CLIP, STEPS = 0.02, 0.5, 3
PROMPT, RESPONSE = 6, 5
ROWS = torch.randint(3, 250, (4, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(5))
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -1.0])


class Memory:
    """Stands for ``torch.cuda`` where verl asks how much memory is in use."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: (1, 1) if name == "mem_get_info" else 0


def use_cpu():
    """Let verl run on a CPU."""
    from verl.plugin.platform import platform_manager
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class OnCPU(PlatformCUDA):
        device_name, vendor_name, device_module = "cpu", "cpu", Memory()
        is_available = staticmethod(lambda: True)
        current_device = staticmethod(lambda: "cpu")
        communication_backend_name = staticmethod(lambda: "gloo")
        empty_cache = staticmethod(lambda: None)
        set_device = staticmethod(lambda device_index: None)

    platform_manager.set_platform(OnCPU())


def batch(rows, advantages, old):
    """The data of a step as verl's controller hands it to a worker."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    count = len(rows)
    mask = torch.ones(count, RESPONSE)
    data = TensorDict(
        {
            "input_ids": rows,
            "prompts": rows[:, :PROMPT],
            "responses": rows[:, PROMPT:],
            "attention_mask": torch.ones_like(rows),
            "position_ids": torch.arange(rows.shape[1]).expand(count, -1).contiguous(),
            "response_mask": mask,
            "advantages": advantages[:, None] * mask,
            "old_log_probs": old,
        },
        batch_size=[count],
    )
    numbers = {"temperature": 1.0, "global_batch_size": 4, "micro_batch_size_per_gpu": 1, "use_dynamic_bsz": False}
    tu.assign_non_tensor(data, **numbers, global_token_num=None)
    return left_right_2_no_padding(data)


def worker_of(path):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    whole = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    model = HFModelConfig(
        path=str(path),
        external_lib="mine_verl",  # it calls train_delta, in every worker
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    engine = FSDPEngineConfig(
        strategy="fsdp2", mixed_precision=whole, use_torch_compile=False, micro_batch_size_per_gpu=1
    )
    adam = {"lr": LR, "weight_decay": 0.0, "clip_grad": CLIP, "betas": (0.9, 0.999)}
    optimizer = FSDPOptimizerConfig(**adam, lr_scheduler_type="constant", total_training_steps=9)
    configs = {"model_config": model, "engine_config": engine, "optimizer_config": optimizer}
    configs["checkpoint_config"] = CheckpointConfig()
    made = TrainingWorker(TrainingWorkerConfig(model_type="language_model", **configs))
    made.reset()
    return made


def copied(adapter):
    return {name: value.clone() for name, value in adapter.values().items()}


def run(rank, path, folder):
    """Take the steps in verl's worker, and write down what has come of them."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=240))
    use_cpu()
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    sys.path.insert(0, str(folder))
    actor = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_kl_loss=False)
    worker = worker_of(path)
    engine = worker.engine
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    share = slice(2 * rank, 2 * rank + 2)
    old = torch.load(folder / "old.pt")
    found = {"measures": [], "norms": [], "start": copied(engine.adapter)}
    for step in range(STEPS):
        out = worker.train_batch(batch(ROWS[share], ADVANTAGES[share], old[share]))
        found["norms"].append(float(out["metrics"]["grad_norm"]))
        found["measures"].append(engine.optimizer.measures.as_dict())
        if step == 0:
            engine.save_checkpoint(f"{folder}/checkpoint", global_step=1)
            found["saved"] = copied(engine.adapter)
    with torch.no_grad(), engine.disable_adapter():
        found["reference"] = engine.module(input_ids=ROWS, use_cache=False).logits
    found["delta"] = copied(engine.adapter)
    found["handed"] = {name: weight.clone() for name, weight in engine.get_per_tensor_param()[0]}
    found["basis"] = dict(engine._basis.axes)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
