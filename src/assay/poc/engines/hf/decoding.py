"""Decoding on transformers: what follows a prompt step by step, and replays of others' values.

A preset with steps decodes tokens with seeded noise, or a chain of points. `StepDraws` runs a batch
of either by the kernels of eager torch; `Draws` and `ChainDraws` say what it begins with, what its
model reads after a value, and what is published.

Legend of shapes: B nonces of a batch, R rows of the padded batch, T positions, P positions of the
prompt, N tokens or points, V vocabulary, Q points to choose from, D hidden size, S sketches, K
length of a sketch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from typing_extensions import override

from assay import streams
from assay.errors import not_finite
from assay.models.decoder import backbone
from assay.models.model import Model
from assay.models.precision import own_precision
from assay.models.shared_passes import check_cached, steps_of_passes
from assay.poc.engines.base import Values, drawn_prompts, drawn_seeds, margins
from assay.poc.engines.hf.seeded_routing import SeededRouting
from assay.poc.protocol.pipelines import Pipeline, sketch_steps
from assay.poc.protocol.round import Input
from assay.poc.protocol.sphere import Chain
from assay.poc.protocol.transforms import sketch_states

_TOKENS_AT_ONCE = 256  # of one nonce whose logits are held, each V numbers


class StepDraws(ABC):
    """What a batch is decoded from; of one use.

    Attributes:
        model: Model that decodes.
        prompts: Ids [R, P] or inputs [R, P, D] that the model reads first.
        steps: Number N of values that are decoded.
        routing: Context in which the model runs.
    """

    model: Model
    prompts: Tensor
    steps: int
    routing: AbstractContextManager[object] = nullcontext()

    @torch.inference_mode()
    def decode(self) -> Values:
        """Return what the model decodes, one step after the other.

        Raises:
            BadWeights: The score of a token or a point is NaN or infinite.
        """
        passes = steps_of_passes(self.model.config, self.prompts.shape[1], self.steps)
        # A pass begins with an empty cache here.
        first_steps = {steps[0] for steps in passes}
        inputs = [self.prompts]
        with own_precision(self.model), self.routing:
            for step in range(self.steps):
                x_RT = inputs[-1]
                if step in first_steps:
                    cache = DynamicCache(config=self.model.module.config)
                    cached = 0
                    x_RT = torch.cat(inputs, dim=1)
                states_RTD = self._run(x_RT, cached, past_key_values=cache, use_cache=True)
                cached += x_RT.shape[1]
                inputs.append(self.follow(states_RTD[:, -1:], step))
            return self.decoded()

    @torch.inference_mode()
    def replay(self, claimed_BN: NDArray[Any]) -> Values:
        """Return what is compared with claimed values, by one forward pass over prompt and claims.

        Raises:
            BadWeights: As :meth:`decode`.
        """
        first = self.prompts.shape[1]
        count = len(claimed_BN)
        padding_RN = claimed_BN[-1:].repeat(len(self.prompts) - count, axis=0)
        claimed_RN = np.concatenate([claimed_BN, padding_RN])
        x_RT = torch.cat([self.prompts, self.after_claims(claimed_RN)], dim=1)
        parts = []
        with own_precision(self.model), self.routing:
            for steps in steps_of_passes(self.model.config, first, self.steps):
                states_RTD = self._run(x_RT[:, : first + steps.stop - 1], 0, use_cache=False)
                parts.append(states_RTD[:, first - 1 + steps.start :])
            return self.replayed(torch.cat(parts, dim=1), claimed_RN, count)

    def _run(self, x_RT: Tensor, cached: int, **options: Any) -> Float[Tensor, "R T D"]:
        """Return the states of ids or inputs that follow ``cached`` others."""
        length = x_RT.shape[1]
        self.begin(cached, length)
        name = "input_ids" if x_RT.ndim == 2 else "inputs_embeds"
        positions_T = torch.arange(cached, cached + length, device=self.model.device)
        positions_RT = positions_T.expand(len(x_RT), -1)
        output = backbone(self.model.module)(**{name: x_RT}, position_ids=positions_RT, **options)
        if options["use_cache"]:
            check_cached(self.model.reference, output)
        states_RTD: Tensor = output.last_hidden_state
        return states_RTD

    def _finite(self, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise not_finite(f"{self.model.reference} returned NaN or infinity")
        return scores

    def begin(self, cached: int, length: int) -> None:  # noqa: B027 - only a mixture's routers ask
        """Say that the next pass has ``length`` positions behind ``cached`` others."""

    @abstractmethod
    def follow(self, states_R1D: Float[Tensor, "R 1 D"], step: int) -> Tensor:
        """Choose the value of a step from its state, and return what the model reads next."""

    @abstractmethod
    def decoded(self) -> Values:
        """Return the chosen values of all steps, as they are published."""

    @abstractmethod
    def after_claims(self, claimed_RN: NDArray[Any]) -> Tensor:
        """Return what the model reads after each of the claimed values but the last."""

    @abstractmethod
    def replayed(
        self, states_RND: Float[Tensor, "R N D"], claimed_RN: NDArray[Any], count: int
    ) -> Values:
        """Return what is compared with the first ``count`` claims, from the states of all."""


class Draws(StepDraws):
    """Prompts, the noise of tokens, and the projections of sketches."""

    def __init__(
        self, inputs: Sequence[Input], pipeline: Pipeline, *, seq_len: int, model: Model
    ) -> None:
        device = model.device
        self.model = model
        self.steps = pipeline.steps
        self._sketched = sketch_steps(pipeline.steps)
        self._backend = streams.get_backend("auto", str(device))
        prompts_BP = drawn_prompts(inputs, seq_len=seq_len, vocab_size=model.vocab_size)
        self.prompts = torch.from_numpy(prompts_BP).to(device)
        noise_BN = drawn_seeds(inputs, "tokens", range(self.steps))
        self._noise_BN = torch.from_numpy(noise_BN.view(np.int32)).to(device)
        self._sketch_BS = drawn_seeds(inputs, "sketch", self._sketched)
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._states: list[Tensor] = []

    def add_noise(self, logits_BV: Float32[Tensor, "B V"], step: int) -> None:
        """Add the Gumbel numbers of one step to the logits of every nonce, in place."""
        self._backend.add_gumbels(logits_BV, self._noise_BN[:, step])

    def sketches(self, states_BSD: Float[Tensor, "B S D"]) -> Float16[np.ndarray, "B S K"]:
        """Return the sketches of the states that gave the sketched tokens."""
        sketches = sketch_states(states_BSD.flatten(0, 1), self._sketch_BS.reshape(-1))
        return sketches.view(*states_BSD.shape[:2], -1).cpu().numpy()

    @override
    def follow(self, states_R1D: Float[Tensor, "R 1 D"], step: int) -> Tensor:
        state_RD = states_R1D[:, 0]
        if step in self._sketched:
            self._states.append(state_RD.float())
        scores_RV = self._logits(state_RD)
        self.add_noise(scores_RV, step)
        tokens_R1 = scores_RV.argmax(dim=-1, keepdim=True)
        self._tokens.append(tokens_R1)
        # The best of scores among which one is NaN is NaN.
        self._scores.append(scores_RV.gather(1, tokens_R1))
        return tokens_R1

    @override
    def decoded(self) -> Values:
        self._finite(torch.cat(self._scores, dim=1))
        tokens_RN = torch.cat(self._tokens, dim=1).cpu().numpy().astype(np.uint32)
        return {"tokens": tokens_RN, "sketches": self.sketches(torch.stack(self._states, dim=1))}

    @override
    def after_claims(self, claimed_RN: NDArray[Any]) -> Tensor:
        ids_RN = torch.from_numpy(claimed_RN[:, :-1].astype(np.int64)).to(self.model.device)
        return ids_RN.clamp(max=self.model.vocab_size - 1)

    @override
    def replayed(
        self, states_RND: Float[Tensor, "R N D"], claimed_RN: NDArray[Any], count: int
    ) -> Values:
        tokens_BN = torch.from_numpy(claimed_RN[:count].astype(np.int64)).to(self.model.device)
        margins_BN = []
        # The products are of one nonce's states, so no other nonce has a part in their bits.
        for row, tokens_N in enumerate(tokens_BN):
            parts = []
            for start in range(0, len(tokens_N), _TOKENS_AT_ONCE):
                places = slice(start, start + _TOKENS_AT_ONCE)
                scores_NV = self._logits(states_RND[row, places])
                self._backend.add_gumbels(scores_NV, self._noise_BN[row, places])
                parts.append(margins(scores_NV, tokens_N[places]))
            margins_BN.append(torch.cat(parts))
        sketches_RSK = self.sketches(states_RND[:, self._sketched])
        return {"margins": torch.stack(margins_BN).cpu().numpy(), "sketches": sketches_RSK}

    def _logits(self, states_ND: Float[Tensor, "N D"]) -> Float32[Tensor, "N V"]:
        """Return the product of states with the head matrix, without bias or capping of logits.

        It is one product, because row by row would take longer than all layers of a step. So the
        last bits of a token's logits may depend on the rows of the batch on processors whose
        products do, and the noise of honest engines has that in it.
        """
        weight_VD: Tensor = self.model.module.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        return (states_ND.to(weight_VD.dtype) @ weight_VD.T).float()


class ChainDraws(StepDraws):
    """The noise of the prompts, and the chain of inputs and points that follow.

    Attributes:
        chain: Chain of the batch.
        previous_R1: Points before the next step; step 0 has none.
        scores: Scores [R, 1, Q] of every step until now.
    """

    def __init__(
        self, chain: Chain, prompts_RPD: Float[Tensor, "R P D"], steps: int, model: Model
    ) -> None:
        self.chain = chain
        self.model = model
        self.prompts = prompts_RPD
        self.steps = steps + 1
        self.previous_R1 = np.zeros((len(prompts_RPD), 1), np.uint8)
        self.scores: list[Tensor] = []
        self.routing: SeededRouting = SeededRouting(model, chain.inputs)

    @override
    def begin(self, cached: int, length: int) -> None:
        self.routing.begin(self.prompts.shape[1], cached, length)

    @override
    def follow(self, states_R1D: Float[Tensor, "R 1 D"], step: int) -> Tensor:
        self.scores.append(self.chain.scores(states_R1D, self.previous_R1, step))
        self.previous_R1 = self.scores[-1].argmax(dim=-1).to(torch.uint8).cpu().numpy()
        return self.chain.embeddings(self.previous_R1, step + 1)

    @override
    def decoded(self) -> Values:
        scores_RNQ = self._finite(torch.cat(self.scores, dim=1))
        return {"points": scores_RNQ.argmax(dim=-1).to(torch.uint8).cpu().numpy()}

    @override
    def after_claims(self, claimed_RN: NDArray[Any]) -> Tensor:
        return self.chain.embeddings(claimed_RN[:, :-1], 1)

    @override
    def replayed(
        self, states_RND: Float[Tensor, "R N D"], claimed_RN: NDArray[Any], count: int
    ) -> Values:
        before_RN = np.concatenate([self.previous_R1, claimed_RN[:, :-1]], axis=1)
        scores_RNQ = self._finite(self.chain.scores(states_RND, before_RN))
        claimed_BN = torch.from_numpy(claimed_RN[:count].astype(np.int64)).to(scores_RNQ.device)
        rows = [margins(*row) for row in zip(scores_RNQ[:count], claimed_BN, strict=True)]
        return {"margins": torch.stack(rows).cpu().numpy()}
