"""The weights that TRL hands to a vLLM that generates.

TRL calls ``load_weights`` of a vLLM in the same process once for every weight, and each call lists all parameters of
vLLM's model. Here one call takes them all: 0.017 s for 0.19 s with the 310 weights of shape:qwen3-0.6b on an H200, in a
step of 0.97 s (benchmarks/results/vhack_vllm_h200.json, ``sections``).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta.delta import DeltaS


def sync_merged(trainer: Any, adapter: DeltaS) -> None:
    """Let a trainer of TRL with ``use_vllm`` hand over the weights of :meth:`DeltaS.weights`, in both of its modes.

    By itself TRL sends every parameter, those of δS too, which vLLM does not know, and takes LoRA out again by
    subtraction, which leaves errors of rounding in the weights.

    Args:
        trainer: Trainer whose ``vllm_generation`` is there.
        adapter: Adapter of its model.

    Raises:
        UsageError: The trainer does not generate with vLLM.
    """
    generation: Any = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise UsageError(
            f"{type(trainer).__name__} without vLLM", wanted="one with use_vllm=True", do="leave sync_merged out"
        )

    def named() -> Iterator[tuple[str, Tensor]]:
        return ((generation._fix_param_name_to_vllm(name), weight) for name, weight in adapter.weights())

    def loaded() -> Iterator[tuple[str, Tensor]]:
        """Load all weights into the vLLM of this process, and leave TRL none to load one by one."""
        generation.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(named())
        return iter(())

    generation._iter_named_params = loaded if generation.mode == "colocate" else named
