"""Decoding on transformers: a loop with a key-value cache, and the one forward pass that checks it.

Legend of shapes: B nonces of a batch, P positions of the prompt, N tokens, V vocabulary, D hidden size, S sketches.
"""

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from assay.errors import not_finite
from assay.models.decoder import backbone
from assay.models.load import Model
from assay.models.wide import wide_products
from assay.poc.engines.decoding import Decoded, Draws, Replayed, margins
from assay.poc.engines.hf.memory import check_fits, check_shape
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import ROWS_OF_A_PRODUCT

_TOKENS_AT_ONCE = 256  # of one nonce whose logits are held, each V numbers


class Decoder(Protocol):
    """What decoding needs of an engine."""

    model: Model
    batch_size: int
    seq_len: int
    vocab_size: int
    device: torch.device

    def draws(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Draws:
        """Return what is drawn for nonces."""


def decoded(engine: Decoder, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[Decoded]:
    """Decode the tokens of nonces, a batch at a time; the last batch is padded, then cut."""
    rows = _rows(engine, pipeline)
    for start in range(0, len(nonces), engine.batch_size):
        wanted = list(nonces[start : start + engine.batch_size])
        draws = engine.draws(round, pipeline, wanted + wanted[-1:] * (rows - len(wanted)))
        with wide_products(engine.model):
            tokens_BN, states_BSD = _decode(engine, draws)
        count = len(wanted)
        sketches_BSK = draws.sketches(states_BSD)[:count]
        _check_finite(engine.model, sketches_BSK)
        yield Decoded(tokens_BN[:count].cpu().numpy().astype(np.uint32), sketches_BSK)


def replayed(
    engine: Decoder, round: Round, pipeline: Pipeline, nonces: Sequence[int], tokens_MN: NDArray[np.uint32]
) -> Generator[Replayed]:
    """Replay given tokens of nonces, a batch at a time; the last batch is padded, then cut."""
    rows = _rows(engine, pipeline)
    for start in range(0, len(nonces), engine.batch_size):
        wanted = list(nonces[start : start + engine.batch_size])
        pad = rows - len(wanted)
        given_BN = torch.from_numpy(tokens_MN[start : start + len(wanted)].astype(np.int64)).to(engine.device)
        draws = engine.draws(round, pipeline, wanted + wanted[-1:] * pad)
        tokens_BN = torch.cat([given_BN, given_BN[-1:].expand(pad, -1)])
        count = len(wanted)
        with wide_products(engine.model):
            states_BND = _prefill(engine, draws, tokens_BN)
            found = [_margins(engine, draws, row, states_BND[row], tokens_BN[row]) for row in range(count)]
        sketches_BSK = draws.sketches(states_BND[:, draws.sketched])[:count]
        margins_BN = torch.stack(found).cpu().numpy()
        _check_finite(engine.model, sketches_BSK, margins_BN)
        yield Replayed(margins_BN, sketches_BSK)


def _rows(engine: Decoder, pipeline: Pipeline) -> int:
    """Return the rows that decode together: a step has one position of each, and a product needs 16 rows or one.

    Raises:
        UsageError: Prompt and tokens are longer than the model's positions.
        OutOfMemory: They do not fit.
    """
    model, positions = engine.model, engine.seq_len + pipeline.steps
    check_shape(model, batch_size=engine.batch_size, seq_len=engine.seq_len, steps=pipeline.steps)
    rows = engine.batch_size if engine.batch_size == 1 else max(engine.batch_size, ROWS_OF_A_PRODUCT)
    check_fits(model, rows, positions)
    return rows


@torch.inference_mode()
def _decode(engine: Decoder, draws: Draws) -> tuple[Int64[Tensor, "B N"], Float32[Tensor, "B S D"]]:
    """Return the decoded tokens, and the states behind the sketched ones."""
    body, cache = backbone(engine.model.module), DynamicCache(config=engine.model.module.config)
    inputs_BT, tokens, states = draws.prompts_BP, [], []
    seen = 0
    for step in range(draws.steps):
        positions_T = torch.arange(seen, seen + inputs_BT.shape[1], device=engine.device)
        output = body(
            input_ids=inputs_BT,
            position_ids=positions_T.expand_as(inputs_BT),
            past_key_values=cache,
            use_cache=True,
        )
        state_BD = output.last_hidden_state[:, -1]
        if step in draws.sketched:
            states.append(state_BD.float())
        scores_BV = _logits(engine, state_BD)
        draws.add_noise(scores_BV, step)
        tokens.append(scores_BV.argmax(dim=-1))
        seen += inputs_BT.shape[1]
        inputs_BT = tokens[-1].unsqueeze(1)
    return torch.stack(tokens, dim=1), torch.stack(states, dim=1)


@torch.inference_mode()
def _prefill(engine: Decoder, draws: Draws, tokens_BN: Int64[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
    """Return the states that gave the tokens, by one forward pass over the prompt and all tokens but the last."""
    given_BT = torch.cat([draws.prompts_BP, tokens_BN[:, :-1].clamp(max=engine.vocab_size - 1)], dim=1)
    positions_T = torch.arange(given_BT.shape[1], device=engine.device)
    body = backbone(engine.model.module)
    output = body(input_ids=given_BT, position_ids=positions_T.expand_as(given_BT), use_cache=False)
    states_BTD: Tensor = output.last_hidden_state
    return states_BTD[:, draws.prompts_BP.shape[1] - 1 :]


@torch.inference_mode()
def _margins(
    engine: Decoder, draws: Draws, row: int, states_ND: Float[Tensor, "N D"], tokens_N: Int64[Tensor, " N"]
) -> Float32[Tensor, " N"]:
    """Return how far the score of every token of a nonce is below the best one.

    The products are of one nonce's states, so no other nonce has a part in their bits.
    """
    parts = []
    for start in range(0, len(tokens_N), _TOKENS_AT_ONCE):
        chosen = slice(start, start + _TOKENS_AT_ONCE)
        scores_NV = _logits(engine, states_ND[chosen])
        draws.add_noise_of(row, scores_NV, start)
        parts.append(margins(scores_NV, tokens_N[chosen]))
    return torch.cat(parts)


def _logits(engine: Decoder, states_ND: Float[Tensor, "N D"]) -> Float32[Tensor, "N V"]:
    """Return the product of states with the model's own head matrix; no bias, no capping of logits.

    It is one product, because row by row would take longer than all layers of a step. So the last bits of a token's
    logits may depend on the rows of the batch on processors whose products do, and the noise of honest engines has that
    in it.
    """
    weight_VD: Tensor = engine.model.module.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    return (states_ND.to(weight_VD.dtype) @ weight_VD.T).float()


def _check_finite(model: Model, *computed: np.ndarray) -> None:
    if any(np.isnan(values).any() for values in computed):  # an infinite margin is that of an id without a token
        raise not_finite(f"{model.reference} returned NaN or infinity")
