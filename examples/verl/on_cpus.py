"""What verl lacks to run without an accelerator: a platform, and rollouts by transformers.

    VERL_USE_EXTERNAL_MODULES=on_cpus VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda

verl imports this module in each of its processes, by the first of these variables. The engine that
trains is verl's own for GPUs, FSDP2. On GPUs leave all three out, and take vLLM or SGLang.
"""

import asyncio
import os
from collections.abc import Iterable
from contextlib import nullcontext
from types import ModuleType

import ray
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.utils import distributed
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "transformers"
# Requests that come within so many seconds are generated together.
TOGETHER = 0.05

# verl would ask for "cpu:gloo,cpu:gloo", which torch refuses: one device twice.
distributed.initialize_global_process_group_ray.__defaults__ = (None, "gloo")


def _nothing(*_: object, **__: object) -> int:
    """Take the place of what an accelerator does or counts."""
    return 0


def _device_module() -> ModuleType:
    """Return torch.cpu, with what verl also calls of a device."""
    module = ModuleType("torch_cpu")
    vars(module).update(vars(torch.cpu))
    module.is_available = lambda: False
    module.get_device_name = lambda: "CPU"
    module.set_rng_state = torch.set_rng_state
    for name in ("empty_cache", "synchronize", "set_device"):
        setattr(module, name, _nothing)
    for kind in ("allocated", "reserved"):
        setattr(module, f"memory_{kind}", _nothing)
        setattr(module, f"max_memory_{kind}", _nothing)
    module.mem_get_info = lambda: (0, 0)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """A machine without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()
    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)
    set_device = staticmethod(_nothing)
    synchronize = staticmethod(_nothing)
    set_allocator_settings = staticmethod(_nothing)
    empty_cache = staticmethod(_nothing)
    profiler_start = staticmethod(_nothing)
    profiler_stop = staticmethod(_nothing)
    cudart = staticmethod(_nothing)

    def is_available(self) -> bool:
        """Return True: there always is a CPU."""
        return True

    def current_device(self) -> str:
        """Return the device's name: a number would be that of a GPU."""
        return "cpu"

    def device_count(self) -> int:
        """Return 1: torch counts all cores as one device."""
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        """Return nothing: only GPUs have one."""
        return None, None

    def communication_backend_name(self) -> str:
        """Return the backend of torch that needs no accelerator."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Return a variable that nothing reads."""
        return "CPU_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> nullcontext[None]:
        """Return a context that measures nothing."""
        return nullcontext()

    def ray_resource_name(self) -> str:
        """Return what verl counts: Ray is told of places for workers by that name."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Return no variable: Ray hides no device."""
        return []

    def is_ipc_supported(self) -> bool:
        """Return False: there is no memory of a device to share."""
        return False


@ray.remote
class Server:
    """Generates with a copy of the policy; requests that come together are one batch.

    Args:
        path: Directory of the checkpoint, for its configuration.
        length: Tokens of a response at most.
    """

    def __init__(self, path: str, length: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.length = length
        self.step = 0
        self.waiting: list[tuple[torch.Tensor, asyncio.Future[list[int]]]] = []
        self.one_batch = asyncio.Lock()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict, **_: object
    ) -> TokenOutput:
        """Return a response to a prompt."""
        response = asyncio.get_running_loop().create_future()
        self.waiting.append((torch.tensor(prompt_ids), response))
        if len(self.waiting) == 1:
            await asyncio.sleep(TOGETHER)
            async with self.one_batch:
                batch = self.waiting
                self.waiting = []
                prompts = [ids for ids, _ in batch]
                rows = await asyncio.to_thread(self._generate, prompts, sampling_params)
            for (_, future), row in zip(batch, rows, strict=True):
                future.set_result(row)
        return TokenOutput(
            token_ids=await response,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    def _generate(self, prompts: list[torch.Tensor], sampling: dict) -> list[list[int]]:
        """Return the ids of responses, each to its end token."""
        config = self.model.generation_config
        ids_BT = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
        is_token_BT = ids_BT >= 0
        made_BT = self.model.generate(
            ids_BT.clamp(min=0),
            attention_mask=is_token_BT.long(),
            max_new_tokens=self.length,
            do_sample=sampling["temperature"] > 0,
            temperature=sampling["temperature"] or None,
            top_p=sampling["top_p"],
            top_k=max(sampling["top_k"], 0),
        )[:, ids_BT.shape[1] :]
        rows = made_BT.tolist()
        end = config.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    async def load(self, weights: dict[str, torch.Tensor], step: int) -> None:
        """Take up the weights of a step."""
        async with self.one_batch:
            self.model.load_state_dict(weights)
            self.step = step

    async def sleep(self) -> None:
        """Keep the memory: there is no GPU that training needs."""

    async def wake_up(self) -> None:
        """Do nothing, as `sleep` did."""


class Replica(RolloutReplica):
    """One server, beside each process that trains."""

    async def launch_servers(self) -> None:
        """Start the server under the name by which the process that trains finds it."""
        name = f"{NAME}_{self.replica_rank}"
        server = Server.options(name=name, num_cpus=0, max_concurrency=self.max_concurrency)
        self._server_handle = server.remote(self.model_config.path, self.config.response_length)
        self._server_address = name
        self.servers = [self._server_handle]


class Rollout(base.BaseRollout):
    """Hands the weights of the process that trains to its server."""

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        **_: object,
    ) -> None:
        """Send all weights, whole."""
        server = ray.get_actor(f"{NAME}_{os.environ['RANK']}")
        whole = {name: tensor.detach().float() for name, tensor in weights}
        await server.load.remote(whole, global_steps or 0)

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: nothing was released."""

    async def release(self) -> None:
        """Keep the memory: there is no GPU that training needs."""


base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.{Rollout.__name__}"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
