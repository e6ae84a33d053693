"""What all starts of vLLM share: what the machine needs, and the words of a failure."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from assay.errors import AssayError, ModelError, UsageError, reason_of

# VLLM would take most of the machine's memory; nonces and replays need a little.
CPU_KV_BYTES = 2**30


def runs_on_cpu() -> bool:
    """Return whether the installed build of vLLM is that for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def fit_machine(dtype: str | None, options: Mapping[str, Any]) -> dict[str, int]:
    """Prepare this process for its own engine, and return engine arguments for the machine.

    On a CPU they bound the cache, unless ``options`` say how much vLLM may take. On a GPU vLLM
    starts its processes anew: by itself it forks this one, and a forked process cannot use a GPU
    once this one has counted GPUs.
    """
    if runs_on_cpu():
        return (
            {} if "gpu_memory_utilization" in options else {"kv_cache_memory_bytes": CPU_KV_BYTES}
        )
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    multiply_exactly(dtype)
    return {}


def multiply_exactly(dtype: str | None) -> None:
    """Have triton compute float32 products exactly in this process and its children.

    By default triton rounds the factors of a float32 product to the ten bits of TF32. On a GPU
    vLLM's attention in float32 is such a kernel: distances were up to 3e-5 from those of other
    engines, where honest noise is 3e-7, and an honest node was found to be a fraud. Models in other
    formats are left alone: they do not need it, and some of their kernels would be slower.
    """
    if dtype in ("float32", "float"):
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


@contextmanager
def explain_start() -> Iterator[None]:
    """Say what went wrong where vLLM reads its options and starts.

    Raises:
        UsageError: vLLM has no such option, or refuses its value.
        ModelError: vLLM does not start.
    """
    try:
        yield
    except AssayError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"options of vLLM: {error}"[:500],
            wanted="its engine arguments",
            do="see `vllm serve --help`",
        ) from None
    except Exception as error:  # vLLM fails to start in many ways
        raise ModelError(
            f"vLLM does not start: {reason_of(error)}"[:500],
            wanted="an engine",
            do="see its log above",
        ) from error
