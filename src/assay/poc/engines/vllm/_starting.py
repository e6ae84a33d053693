"""What all starts of vLLM share, for nonces and for replays: the memory on a CPU, and the words of a failure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from assay.errors import AssayError, ModelError, UsageError, reason_of

CPU_KV_BYTES = 2**30  # vLLM would take most of the machine's memory; nonces and replays need a little


def runs_on_cpu() -> bool:
    """Return whether the installed build of vLLM is that for CPUs."""
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    return bool(current_platform.is_cpu())


def memory_on_cpu(options: Mapping[str, Any]) -> dict[str, int]:
    """Return the engine arguments that bound the cache on a CPU; none where the options say how much vLLM may take.

    Args:
        options: Engine arguments of vLLM that were asked for.
    """
    return {} if "gpu_memory_utilization" in options else {"kv_cache_memory_bytes": CPU_KV_BYTES}


@contextmanager
def explained_start() -> Iterator[None]:
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
            f"options of vLLM: {error}"[:500], wanted="its engine arguments", do="see `vllm serve --help`"
        ) from None
    except Exception as error:  # vLLM fails to start in many ways
        raise ModelError(
            f"vLLM does not start: {reason_of(error)}"[:500], wanted="an engine", do="see its log above"
        ) from error
