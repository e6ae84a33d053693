"""Measure the frame of a checkpoint: the mean and scale of its states on random tokens.

Legend of shapes: S sequences, T positions, D hidden size.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from assay import streams
from assay.errors import UsageError
from assay.models.frame import POSITIONS, SEQUENCES, Frame
from assay.models.model import Model
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.checks import join_prefixed
from assay.poc.protocol.pipelines import Positions
from assay.poc.protocol.round import VERSION
from assay.poc.prover import Progress

_BATCH = 8
# Of the median scale: what a coordinate that never moves is divided by.
_SMALLEST = 1e-6


def measure_frame(model: Model, *, progress: Progress | None = None) -> Frame:
    """Measure the frame of a checkpoint on 64 sequences of 64 random tokens.

    Any honest machine and number format will do: the frame is the same for all, whatever noise was
    in it.

    Args:
        model: Model whose states are read.
        progress: Function that is called with (sequences done, sequences in all) after every batch.

    Raises:
        UsageError: The tokenizer leaves no token to draw.
        BadWeights: The model gives NaN or infinity.
        ModelError: The model cannot be run.
        OutOfMemory: The device has no room for a batch of 8 sequences.

    Example:
        >>> import assay
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> frame = assay.poc.measure_frame(model)
        >>> frame.mean.shape, len(frame.left_out) < 16
        ((256,), True)
    """
    positions = min(POSITIONS, model.max_positions)
    engine = HFEngine(model, batch_size=_BATCH, seq_len=positions)
    nothing = np.zeros(model.hidden_size, np.float32)
    # A frame without measurements, for its choice of tokens.
    drawn = Frame(
        digest=model.digest,
        weights=model.weights,
        rows=model.vocab_size,
        left_out=_left_out(model.tokenizer, model.vocab_size),
        mean=nothing,
        scale=nothing + 1,
    )
    words = streams.seeds([join_prefixed(VERSION, "frame", model.digest)], 256)
    ids_ST = drawn.tokens(
        streams.step_seeds(words, np.arange(SEQUENCES * positions)).reshape(SEQUENCES, positions)
    )
    first = Positions().first(positions)
    batches = []
    for start in range(0, SEQUENCES, _BATCH):
        states_BTD = engine.states(engine.embed_tokens(ids_ST[start : start + _BATCH]))
        batches.append(states_BTD[:, first:].cpu().double().numpy().reshape(-1, model.hidden_size))
        if progress:
            progress(start + _BATCH, SEQUENCES)
    states_ND = np.concatenate(batches)
    scale_D = states_ND.std(axis=0)
    # A coordinate that hardly moves would become noise.
    scale_D = np.maximum(scale_D, _SMALLEST * float(np.median(scale_D)) or 1.0)
    return replace(
        drawn,
        mean=states_ND.mean(axis=0).astype(np.float32),
        scale=scale_D.astype(np.float32),
    )


def _left_out(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> Int32[np.ndarray, " E"]:
    """Return the ids that are never drawn: special tokens, and rows of the embeddings without a
    token.
    """
    if tokenizer is None:
        return np.zeros(0, np.int32)
    special = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    drawn = set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)
    left_out = [place for place in range(rows) if place not in drawn]
    if len(left_out) == rows:
        raise UsageError(
            "a tokenizer of special tokens alone",
            wanted="one with tokens to draw",
            do="pass the checkpoint with its own tokenizer",
        )
    return np.array(left_out, np.int32)
