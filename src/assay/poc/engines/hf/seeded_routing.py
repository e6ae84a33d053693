"""Experts that the seeds of a nonce choose, as the chain's decode proof has it in mixtures.

Every layer with experts takes a run of neighbours from a seeded start, with fixed shares. So no
state has a part in the choice, and the router's own weights have none in the proof.

Legend of shapes: B nonces of a batch, T positions, N = B·T rows of a layer, L layers with experts,
E experts, K of them that a row takes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from assay import streams
from assay.errors import ModelError
from assay.models.decoder import expert_count
from assay.models.model import Model
from assay.poc.protocol.round import Input, seed_texts
from assay.streams import definition


class SeededRouting(AbstractContextManager["SeededRouting"]):
    """Replaces what the routers of a mixture choose while open; does nothing to other models.

    Raises:
        ModelError: The mixture has routers of another kind than most in transformers.
    """

    def __init__(self, model: Model, inputs: Sequence[Input]) -> None:
        self._routers = [
            part for part in model.module.modules() if type(part).__name__.endswith("TopKRouter")
        ]
        if expert_count(model.config) and not self._routers:
            raise ModelError(
                f"a mixture of the architecture {model.architecture}",
                wanted="routers that choose the best few of their experts",
                do="choose another preset, such as tokens-1",
            )
        texts = seed_texts(inputs, "route", count=len(self._routers)) if self._routers else []
        self._bases_BL = streams.seeds(texts).reshape(len(inputs), -1) if texts else None
        self._steps_T = np.zeros(0, np.uint32)
        self._hooks = ExitStack()

    def begin(self, prompt: int, cached: int, length: int) -> None:
        """Say which positions the next pass has; those of the prompt are all of step 0."""
        places_T = np.arange(cached, cached + length)
        self._steps_T = np.maximum(places_T - prompt + 1, 0).astype(np.uint32)

    def __enter__(self) -> "SeededRouting":
        for layer, router in enumerate(self._routers):
            hook = partial(self._choose, layer)
            self._hooks.enter_context(router.register_forward_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _choose(self, layer: int, router: nn.Module, args: Any, output: Any) -> Any:
        """Return the logits as they are, with the shares and the numbers of the seeded experts."""
        assert self._bases_BL is not None
        logits_NE, shares_NK, _ = output
        count = shares_NK.shape[-1]
        starts_BT = definition.step_seeds(self._bases_BL[:, layer : layer + 1], self._steps_T[None])
        starts_N1 = torch.from_numpy(starts_BT.astype(np.int64).reshape(-1, 1))
        ids_NK = (starts_N1 + torch.arange(count)) % logits_NE.shape[-1]
        ladder_K = torch.arange(count, 0, -1, dtype=torch.float32).softmax(dim=0)
        shares = ladder_K.to(shares_NK).expand_as(shares_NK)
        return logits_NE, shares.contiguous(), ids_NK.to(logits_NE.device)
