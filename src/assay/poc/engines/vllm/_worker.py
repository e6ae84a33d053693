"""What a worker of vLLM is: its place among the workers, its model, and how it computes."""

import platform
from typing import Any

import torch

from assay.poc.engines.vllm._runners import runner_kind
from assay.streams import dtype_name

__all__ = ["describe", "hidden_size", "is_first_of_group", "is_first_stage", "is_last_stage"]


def hidden_size(config: Any) -> int:
    """D of the model that vLLM serves."""
    return int(config.model_config.get_hidden_size())


def is_first_stage() -> bool:
    """Whether this worker has the first layers."""
    from vllm.distributed import get_pp_group  # type: ignore[import-not-found]

    return bool(get_pp_group().is_first_rank)


def is_last_stage() -> bool:
    """Whether this worker has the last layers, and so hidden states to read."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def is_first_of_group() -> bool:
    """Whether this worker speaks for those that share its layers."""
    from vllm.distributed import get_tp_group

    return bool(get_tp_group().is_first_rank)


def describe(runner: Any, config: Any) -> dict[str, Any]:
    """Return what the fingerprint and the engine need to know of a worker, as plain values."""
    parallel, model = config.parallel_config, config.model_config
    on_cuda = runner.device.type == "cuda"
    return {
        "runner": runner_kind(runner),
        "device": torch.cuda.get_device_name(runner.device)
        if on_cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "dtype": dtype_name(model.dtype),
        "threads": 0 if on_cuda else torch.get_num_threads(),
        "attention": _attention(runner),
        "hidden_size": hidden_size(config),
        "vocab_size": int(model.get_vocab_size()),
        "tensor_parallel": int(parallel.tensor_parallel_size),
        "pipeline_parallel": int(parallel.pipeline_parallel_size),
        "eager": bool(model.enforce_eager),
    }


def _attention(runner: Any) -> str:
    groups = [group for outer in getattr(runner, "attn_groups", []) for group in outer]
    names = sorted({str(group.backend.get_name()) for group in groups})
    return "+".join(names) or "unknown"
