"""What the stages of a pipeline hand on in passes beside the scheduler, over vLLM's own groups.

All stages run the same calls in the same order, so each receives and sends once a pass. A stage
whose pass fails sends a mark in place of states, because the next one waits for something.
"""

from typing import Any

import torch
from torch import Tensor

FAILED = "assay_failed"  # the only tensor that a stage sends for a pass that failed


class StageLink:
    """A worker's links to the stages before and after it; with one stage they do nothing."""

    is_first = is_last = True

    def __init__(self, stages: int, device: torch.device) -> None:
        if stages == 1:
            return
        from vllm.distributed import get_pp_group, get_tp_group

        self._pipeline: Any = get_pp_group()
        # Its workers have the same states, so each sends a part of them.
        self._equals = get_tp_group()
        self.is_first = bool(self._pipeline.is_first_rank)
        self.is_last = bool(self._pipeline.is_last_rank)
        # Made now: a pass that fails may have used up the memory.
        self._mark = {FAILED: torch.ones(1, device=device)}
        self._sending: list[Any] = []

    def receive(self) -> dict[str, Tensor] | None:
        """Return the states of the stage before; None on the first stage."""
        if self.is_first:
            return None
        states: dict[str, Tensor] = self._pipeline.recv_tensor_dict(all_gather_group=self._equals)
        return states

    def send(self, states: Any) -> None:
        """Send what the layers of this stage returned to the next one, if there is one.

        None says that the pass failed. The pass after this one runs meanwhile, and no more: what
        is sent takes memory until the next stage has received it.
        """
        if self.is_last:
            return
        for handle in self._sending:
            handle.wait()
        # The first handle is that of names and shapes, which vLLM keeps by itself.
        self._sending = self._pipeline.isend_tensor_dict(
            self._mark if states is None else states.tensors, all_gather_group=self._equals
        )[1:]
