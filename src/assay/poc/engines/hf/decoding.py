"""Decoding on transformers: tokens of a prompt with seeded noise, and replays of others'.

Legend of shapes: B nonces of a batch, R rows of the padded batch, T positions, P positions of the
prompt, N tokens, V vocabulary, D hidden size, S sketches, K length of a sketch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from assay import streams
from assay.models.decoder import backbone
from assay.models.model import Model
from assay.models.precision import own_precision
from assay.models.shared_passes import steps_of_passes
from assay.poc.engines.base import Values, drawn_prompts, drawn_seeds, margins
from assay.poc.protocol.pipelines import Pipeline, sketch_steps
from assay.poc.protocol.round import Input
from assay.poc.protocol.transforms import sketch_states

_TOKENS_AT_ONCE = 256  # of one nonce whose logits are held, each V numbers


class Draws:
    """What is drawn for a batch: prompts, the noise of tokens, and the projections of sketches."""

    def __init__(
        self, inputs: Sequence[Input], pipeline: Pipeline, *, seq_len: int, model: Model
    ) -> None:
        device = model.device
        self.steps = pipeline.steps
        self.sketched = sketch_steps(pipeline.steps)
        self._backend = streams.get_backend("auto", str(device))
        prompts_BP = drawn_prompts(inputs, seq_len=seq_len, vocab_size=model.vocab_size)
        self.prompts_BP: Int64[Tensor, "B P"] = torch.from_numpy(prompts_BP).to(device)
        noise_BN = drawn_seeds(inputs, "tokens", range(self.steps))
        self._noise_BN = torch.from_numpy(noise_BN.view(np.int32)).to(device)
        self._sketch_BS = drawn_seeds(inputs, "sketch", self.sketched)

    def add_noise(self, logits_BV: Float32[Tensor, "B V"], step: int) -> None:
        """Add the Gumbel numbers of one step to the logits of every nonce, in place."""
        self._backend.add_gumbels(logits_BV, self._noise_BN[:, step])

    def add_noise_of(self, row: int, logits_NV: Float32[Tensor, "N V"], start: int) -> None:
        """Add the Gumbel numbers from step ``start`` on to the logits of one nonce, in place."""
        self._backend.add_gumbels(logits_NV, self._noise_BN[row, start : start + len(logits_NV)])

    def sketches(self, states_BSD: Float[Tensor, "B S D"]) -> Float16[np.ndarray, "B S K"]:
        """Return the sketches of the states that gave the sketched tokens."""
        sketches = sketch_states(states_BSD.flatten(0, 1), self._sketch_BS.reshape(-1))
        return sketches.view(*states_BSD.shape[:2], -1).cpu().numpy()


class Decoder:
    """Decodes and replays the tokens of a model by the kernels of eager torch."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._backbone = backbone(model.module)

    def decode(self, draws: Draws) -> Values:
        """Return the tokens [R, N] that the model decodes, and their sketches [R, S, K]."""
        with own_precision(self.model):
            tokens_RN, states_RSD = self._decode(draws)
        return {
            "tokens": tokens_RN.cpu().numpy().astype(np.uint32),
            "sketches": draws.sketches(states_RSD),
        }

    def replay(self, draws: Draws, claimed_BN: NDArray[np.uint32]) -> Values:
        """Return the margins [B, N] of claimed tokens, and their sketches [R, S, K]."""
        tokens_BN = torch.from_numpy(claimed_BN.astype(np.int64)).to(self.model.device)
        with own_precision(self.model):
            states_RND, margins_BN = self._replay(draws, tokens_BN)
        sketches_RSK = draws.sketches(states_RND[:, draws.sketched])
        return {"margins": margins_BN.cpu().numpy(), "sketches": sketches_RSK}

    @torch.inference_mode()
    def _decode(self, draws: Draws) -> tuple[Int64[Tensor, "R N"], Float32[Tensor, "R S D"]]:
        """Return the decoded tokens, and the states behind the sketched ones."""
        prompts_RP = draws.prompts_BP
        tokens: list[Tensor] = []
        states: list[Tensor] = []
        passes = steps_of_passes(self.model.config, prompts_RP.shape[1], draws.steps)
        # A pass begins with an empty cache here.
        first_steps = {steps[0] for steps in passes}
        for step in range(draws.steps):
            if step in first_steps:
                cache = DynamicCache(config=self.model.module.config)
                cached = 0
                columns = [token_R.unsqueeze(1) for token_R in tokens]
                ids_RT = torch.cat([prompts_RP, *columns], dim=1)
            states_RTD = self._states(ids_RT, cached, past_key_values=cache, use_cache=True)
            state_RD = states_RTD[:, -1]
            if step in draws.sketched:
                states.append(state_RD.float())
            scores_RV = self._logits(state_RD)
            draws.add_noise(scores_RV, step)
            tokens.append(scores_RV.argmax(dim=-1))
            cached += ids_RT.shape[1]
            ids_RT = tokens[-1].unsqueeze(1)
        return torch.stack(tokens, dim=1), torch.stack(states, dim=1)

    @torch.inference_mode()
    def _replay(
        self, draws: Draws, claimed_BN: Int64[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "R N D"], Float32[Tensor, "B N"]]:
        """Return the states that gave the claimed tokens, by one forward pass, and their margins.

        The products of margins are of one nonce's states, so no other nonce has a part in their
        bits.
        """
        prompts_RP = draws.prompts_BP
        padding = claimed_BN[-1:].expand(len(prompts_RP) - len(claimed_BN), -1)
        tokens_RN = torch.cat([claimed_BN, padding])
        ids_RT = torch.cat(
            [prompts_RP, tokens_RN[:, :-1].clamp(max=self.model.vocab_size - 1)], dim=1
        )
        first = prompts_RP.shape[1]
        passes = steps_of_passes(self.model.config, first, tokens_RN.shape[1])
        read = partial(self._states, cached=0, use_cache=False)
        parts = [
            read(ids_RT[:, : first + steps.stop - 1])[:, first - 1 + steps.start :]
            for steps in passes
        ]
        states_RND = torch.cat(parts, dim=1)
        margins_BN = []
        for row, tokens_N in enumerate(claimed_BN):
            parts = []
            for start in range(0, len(tokens_N), _TOKENS_AT_ONCE):
                places = slice(start, start + _TOKENS_AT_ONCE)
                scores_NV = self._logits(states_RND[row, places])
                draws.add_noise_of(row, scores_NV, start)
                parts.append(margins(scores_NV, tokens_N[places]))
            margins_BN.append(torch.cat(parts))
        return states_RND, torch.stack(margins_BN)

    def _states(
        self, ids_RT: Int64[Tensor, "R T"], cached: int, **options: Any
    ) -> Float[Tensor, "R T D"]:
        """Return the states of tokens that follow ``cached`` others."""
        positions_T = torch.arange(cached, cached + ids_RT.shape[1], device=self.model.device)
        output = self._backbone(
            input_ids=ids_RT, position_ids=positions_T.expand_as(ids_RT), **options
        )
        states_RTD: Tensor = output.last_hidden_state
        return states_RTD

    def _logits(self, states_ND: Float[Tensor, "N D"]) -> Float32[Tensor, "N V"]:
        """Return the product of states with the head matrix, without bias or capping of logits.

        It is one product, because row by row would take longer than all layers of a step. So the
        last bits of a token's logits may depend on the rows of the batch on processors whose
        products do, and the noise of honest engines has that in it.
        """
        weight_VD: Tensor = self.model.module.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        return (states_ND.to(weight_VD.dtype) @ weight_VD.T).float()
