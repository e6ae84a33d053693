"""Stand-ins for what the direct path reads of vLLM: an engine with workers, its settings, and a model runner."""

import asyncio
from types import SimpleNamespace

import numpy as np
import torch

from assay.poc import Round, get_pipeline
from assay.poc.vllm.client import Client
from assay.poc.vllm.direct_stream import DirectStream
from assay.poc.vllm.rows import Spec, split_id
from assay.poc.vllm.throttle import Throttle, ThrottleSettings

SPEC = Spec(Round(block_hash="b", public_key="k", seq_len=8), get_pipeline("poc-2.0"))


class Workers:
    """An engine whose one worker returns the nonce itself, by either path."""

    def __init__(self, *, batch: int = 4, engines: int = 1, **settings) -> None:
        self.batch, self.chat, self.broken, self.dead, self.most, self.running = batch, 0, False, False, 0, 0
        self.called: list[list[int]] = []
        self.dealt: list[list[list[int]]] = []
        self.requested: list[int] = []
        self.begun: dict[int, dict] = {}  # by engine, the call whose values nothing has asked for
        self.flushed, self.turn = 0, asyncio.Lock()
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(policy="priority"))
        self.throttle = Throttle(ThrottleSettings(**settings), lambda: self.chat + self.throttle.in_flight, 16)
        self.client = Client(self, self.throttle, engines)
        self.engine_core = self

    async def collective_rpc(self, method: str, args: tuple, engine: int = 0):
        if method == "assay_batch":
            return [{"batch": self.batch, "reason": None if self.batch else "a reason"}]
        if method == "assay_pass":
            call, _, shares, _, wait = args
            self.called.append(shares[engine])
            if self.dead:
                raise RuntimeError("EngineCore died")
            begun = {
                "call": call,
                **({"error": "broken"} if self.broken else {"seconds": 0.002, **self.reply(shares[engine])}),
            }
            self.running += 1
            self.most = max(self.most, self.running)
            async with self.turn:  # a worker takes calls in order
                before, self.begun[engine] = self.begun.get(engine), begun
                await asyncio.sleep(0.002)
                self.running -= 1
                return [[each for each in (before, self.begun.pop(engine, None) if wait else None) if each]]
        if method == "assay_flush":
            async with self.turn:
                self.flushed += 1
                return [[self.begun.pop(engine)] if engine in self.begun else []]
        return [self.reply(args[1]) if method == "assay_collect" else None]

    async def call_utility_all_async(self, utility: str, method: str, timeout, args: tuple, kwargs):
        assert (utility, timeout, kwargs) == ("collective_rpc", None, None)
        self.dealt += [args[2]] if method == "assay_pass" else []
        return [await self.collective_rpc(method, args, engine) for engine in range(self.client._engines)]

    @staticmethod
    def reply(nonces):
        values = np.array(nonces, np.float32)
        return {"failed": {}, "nonces": nonces, "values": values.tobytes(), "dtype": "float32", "width": 0}

    async def generate(self, prompt, sampling, name, priority):
        self.requested.append(split_id(name)[1])
        await asyncio.sleep(0)
        yield None


async def values_of(workers: Workers, count: int, batch_size: int = 8, between=None) -> list[float]:
    """Return the values of a stream in their order; ``between`` is called with the number of those that are there."""
    stream = DirectStream(workers.client, SPEC, range(count), batch_size, 8)
    await stream.open()
    values: list[float] = []
    while (batch := await stream.next()) is not None:
        values += batch.tolist()
        if between is not None:
            await between(len(values))
    await stream.close()
    return values


def run(workers: Workers, count: int, **options) -> list[float]:
    return asyncio.run(values_of(workers, count, **options))


def config(**changed):
    """The settings that are read of a vLLM configuration, as they are by default."""
    made = {
        "scheduler_config": SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=16),
        "model_config": SimpleNamespace(
            dtype=torch.float32, enable_sleep_mode=False, uses_mrope=False, get_hidden_size=lambda: 16
        ),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, enable_eplb=False, use_ubatching=False
        ),
        "compilation_config": SimpleNamespace(static_forward_context={}, pass_config=SimpleNamespace(enable_sp=False)),
        "cache_config": SimpleNamespace(),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
    }
    for path, value in changed.items():
        owner, _, name = path.rpartition("__")
        if owner:
            setattr(made[owner], name, value)
        else:
            made[path] = value
    return SimpleNamespace(**made)


class FullAttentionSpec:
    pass


class MambaSpec:
    pass


def runner(config, *, specs=(FullAttentionSpec,), backend: str = "CPU_ATTN", shapes=((9, 2, 4, 8), (9, 2, 4, 8))):
    """A model runner with one attention layer per shape of cache."""
    names = [f"layer{index}" for index in range(len(shapes))]
    known = config.compilation_config.static_forward_context
    known |= {name: SimpleNamespace(kv_cache=torch.ones(shape)) for name, shape in zip(names, shapes, strict=True)}
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend), layer_names=names)
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec()) for spec in specs])
    model = SimpleNamespace()
    return SimpleNamespace(kv_cache_config=groups, attn_groups=[[group]], model=model, device=torch.device("cpu"))
