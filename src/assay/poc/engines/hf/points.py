"""The chain's decode proof on transformers: chains of points, and replays of claimed points.

Legend of shapes: R rows of the padded batch, B nonces of a batch, P positions of the prompt, T
positions, N + 1 points, D hidden size, Q points to choose from.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from assay.errors import not_finite
from assay.models.decoder import backbone
from assay.models.model import Model
from assay.models.precision import own_precision
from assay.models.shared_passes import steps_of_passes
from assay.poc.engines.base import Values, margins
from assay.poc.engines.hf.seeded_routing import SeededRouting
from assay.poc.protocol.sphere import Chain


class ChainDraws:
    """What a batch of nonces needs: the noise of the prompts, the chain, and how many steps."""

    def __init__(self, chain: Chain, prompts_RPD: Float[Tensor, "R P D"], steps: int) -> None:
        self.chain = chain
        self.prompts_RPD = prompts_RPD
        self.steps = steps


class PointDecoder:
    """Runs chains of inputs by the kernels of eager torch."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._backbone = backbone(model.module)

    @torch.inference_mode()
    def decode(self, draws: ChainDraws, claimed_BN: NDArray[np.uint8] | None = None) -> Values:
        """Return the points [R, N + 1] of a chain, one step after the other.

        With claimed points every step follows the claimed point before it, as the network's own
        validator does, and the margins of the claims are returned beside the points.

        Raises:
            BadWeights: A state is NaN or infinite.
        """
        chain = draws.chain
        prompt = draws.prompts_RPD.shape[1]
        first_steps = {
            steps[0] for steps in steps_of_passes(self.model.config, prompt, draws.steps + 1)
        }
        points: list[NDArray[np.uint8]] = []
        scores: list[Tensor] = []
        previous_R1 = np.zeros((len(draws.prompts_RPD), 1), np.uint8)  # of which step 0 has none
        inputs = [draws.prompts_RPD]
        with own_precision(self.model), SeededRouting(self.model, chain.inputs) as routing:
            for step in range(draws.steps + 1):
                if step:
                    inputs.append(chain.embeddings(previous_R1, step))
                x_RTD = inputs[-1]
                # A pass begins with an empty cache here.
                if step in first_steps:
                    cache = DynamicCache(config=self.model.module.config)
                    cached = 0
                    x_RTD = torch.cat(inputs, dim=1)
                routing.begin(prompt, cached, x_RTD.shape[1])
                states_RTD = self._states(x_RTD, cached, past_key_values=cache, use_cache=True)
                cached += x_RTD.shape[1]
                scores.append(chain.scores(states_RTD[:, -1:], previous_R1, step))
                points.append(scores[-1].argmax(dim=-1).to(torch.uint8).cpu().numpy())
                previous_R1 = points[-1]
                if claimed_BN is not None:
                    previous_R1 = _padded(claimed_BN[:, step : step + 1], len(points[-1]))
        scores_RNQ = torch.cat(scores, dim=1)
        self._check(scores_RNQ)
        values: Values = {"points": np.concatenate(points, axis=1)}
        if claimed_BN is None:
            return values
        return {**values, "margins": _margins(scores_RNQ, claimed_BN)}

    @torch.inference_mode()
    def replay(self, draws: ChainDraws, claimed_BN: NDArray[np.uint8]) -> Values:
        """Return the margins [B, N + 1] of claimed points, by one forward pass over prompt and
        chain.
        """
        chain = draws.chain
        prompts_RPD = draws.prompts_RPD
        first = prompts_RPD.shape[1]
        claimed_RN = _padded(claimed_BN, len(prompts_RPD))
        x_RTD = torch.cat([prompts_RPD, chain.embeddings(claimed_RN[:, :-1], 1)], dim=1)
        before_RN = np.concatenate([np.zeros_like(claimed_RN[:, :1]), claimed_RN[:, :-1]], axis=1)
        parts = []
        with own_precision(self.model), SeededRouting(self.model, chain.inputs) as routing:
            read = partial(self._states, cached=0, use_cache=False)
            for steps in steps_of_passes(self.model.config, first, draws.steps + 1):
                length = first + steps.stop - 1
                routing.begin(first, 0, length)
                states_RTD = read(x_RTD[:, :length])[:, first - 1 + steps.start :]
                parts.append(
                    chain.scores(states_RTD, before_RN[:, steps.start : steps.stop], steps.start)
                )
        scores_RNQ = torch.cat(parts, dim=1)
        self._check(scores_RNQ)
        return {"margins": _margins(scores_RNQ, claimed_BN)}

    def _states(
        self, x_RTD: Float[Tensor, "R T D"], cached: int, **options: Any
    ) -> Float[Tensor, "R T D"]:
        """Return the states of inputs that follow ``cached`` others."""
        positions_T = torch.arange(cached, cached + x_RTD.shape[1], device=self.model.device)
        output = self._backbone(
            inputs_embeds=x_RTD, position_ids=positions_T.expand(len(x_RTD), -1), **options
        )
        states_RTD: Tensor = output.last_hidden_state
        return states_RTD

    def _check(self, scores_RNQ: Float[Tensor, "R N Q"]) -> None:
        if not bool(torch.isfinite(scores_RNQ).all()):
            raise not_finite(f"{self.model.reference} returned NaN or infinity")


def _padded(claimed_BN: NDArray[np.uint8], rows: int) -> UInt8[np.ndarray, "R N"]:
    """Return claims with the last one repeated for the rows that pad a batch."""
    return np.concatenate([claimed_BN, claimed_BN[-1:].repeat(rows - len(claimed_BN), axis=0)])


def _margins(scores_RNQ: Float[Tensor, "R N Q"], claimed_BN: NDArray[np.uint8]) -> NDArray[Any]:
    """Return how far the cosine of every claimed point is below the best one."""
    claimed = torch.from_numpy(claimed_BN.astype(np.int64)).to(scores_RNQ.device)
    rows = [margins(*row) for row in zip(scores_RNQ[: len(claimed)], claimed, strict=True)]
    return torch.stack(rows).cpu().numpy()
