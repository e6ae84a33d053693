"""The block factor of a model: how much wider a block's distances are than the chord law."""

import torch

from assay.models.model import Model
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.blocks import BlockFactor, block_factor
from assay.poc.protocol.round import Round

# Nonces whose states are read by default; the factor is then known to a few per cent.
STATES = 128
BATCH = 32


def measure_block_factor(model: Model, round: Round, *, nonces: int = STATES) -> BlockFactor:
    """Measure how much wider the distances of a round's block are than the chord law.

    A few hidden states say where their energy lies. With the folded head of the block that gives
    the width of all its distances, for every node, before any is proved.

    Args:
        model: Model whose states are read.
        round: Round of a preset with signs and a random head.
        nonces: Number of nonces whose states are read, rounded up to whole batches of 32.

    Raises:
        UsageError: The preset has no such factor.
        ModelError: The model cannot be run.
        OutOfMemory: The device has no room for a batch.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_gamma", public_key="node_A", seq_len=16)
        >>> found = assay.poc.measure_block_factor(model, round, nonces=32)
        >>> found.n, 1.0 < found.value < 1.2, 20 < found.effective_dimension < 60
        (32, True, True)
    """
    engine = HFEngine(
        model, batch_size=BATCH, seq_len=round.seq_len, compiled=worth_compiling(model)
    )
    return read_block_factor(engine, round, nonces=nonces)


def read_block_factor(engine: HFEngine, round: Round, *, nonces: int = STATES) -> BlockFactor:
    """Measure the factor of a round's block with an engine that exposes its states."""
    size = engine.batch_size
    batches = [range(start, start + size) for start in range(0, max(nonces, 2), size)]
    states_BD = [engine.read(engine.embeddings(round.inputs(batch))).clone() for batch in batches]
    return block_factor(round, torch.cat(states_BD).cpu().double().numpy())
