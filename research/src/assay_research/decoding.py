"""Cheaters of the preset ``decode``: what saves work, and how the tokens and sketches of a proof
then come about.

Each returns a proof under the header of an honest one, and that is the lie. A draft model that
guesses tokens pays for an honest forward pass over its guesses, so that its sketches are exactly
right and only the tokens can show it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from assay.models.model import Model
from assay.poc.engines.hf.decoding import StepDraws
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import SKETCH_EVERY, Pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.round import Input
from assay.poc.prover import prove


def drafted(honest: Proof, model: Model, draft: Model, *, batch_size: int = 16) -> Proof:
    """Return tokens that a cheaper model decoded with the right noise, with the sketches that the
    real one gives them.

    Args:
        honest: Proof of the round.
        model: Model that was to be run. It runs once over prompt and tokens.
        draft: Cheaper model.
        batch_size: Rows of a batch.
    """
    nonces = [record.nonce for record in honest.records]
    guessed = prove(draft, honest.round, nonces, batch_size=batch_size)
    engine = HFEngine(model, batch_size=batch_size, seq_len=honest.round.seq_len)
    tokens_MN = np.stack([record.tokens for record in guessed.records])
    replayed = engine.run(honest.round.inputs(nonces), honest.header.pipeline, tokens_MN)
    sketches_MSK = np.concatenate([values["sketches"] for values in replayed])
    rows = zip(guessed.records, sketches_MSK, strict=True)
    return _proof(honest, [replace(record, sketches=sketches) for record, sketches in rows])


def forgetful(honest: Proof, model: Model, *, batch_size: int = 16) -> Proof:
    """Return what the model decodes where the first half of every prompt is left out."""
    engine = _Forgetful(model, batch_size=batch_size, seq_len=honest.round.seq_len)
    nonces = [record.nonce for record in honest.records]
    return _proof(honest, prove(model, honest.round, nonces, engine=engine).records)


def repeated(honest: Proof) -> Proof:
    """Return the first half of all tokens and sketches twice: half of the steps were taken."""
    half = (
        honest.header.pipeline.steps // 2 // SKETCH_EVERY * SKETCH_EVERY
        or honest.header.pipeline.steps // 2
    )
    return _proof(
        honest,
        (
            replace(
                record,
                tokens=np.resize(record.tokens[:half], record.tokens.shape),
                sketches=np.resize(
                    record.sketches[: -(-half // SKETCH_EVERY)], record.sketches.shape
                ),
            )
            for record in honest.records
        ),
    )


def recycled(honest: Proof, *, seed: int = 0) -> Proof:
    """Return for half of the nonces, drawn by a seed, the tokens and sketches of the one before it.

    They are drawn because a machine that is wrong at fixed places of its batches counts as faulty.
    """
    records = honest.records
    chosen = np.random.default_rng(seed).permutation(len(records)) % 2 == 1
    return _proof(
        honest,
        (
            replace(records[i - 1] if chosen[i] else record, nonce=record.nonce)
            for i, record in enumerate(records)
        ),
    )


class _Forgetful(HFEngine):
    """An engine that drops the first half of every prompt."""

    def draws(self, inputs: Sequence[Input], pipeline: Pipeline) -> StepDraws:
        draws = super().draws(inputs, pipeline)
        draws.prompts = draws.prompts[:, self.seq_len // 2 :]
        return draws


def _proof(honest: Proof, records: Iterable[Any]) -> Proof:
    return Proof.build(honest.header, list(records), honest.footer.seconds)
