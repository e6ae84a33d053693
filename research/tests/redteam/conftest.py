"""A small scene: the small checkpoint, 32 positions."""

from pathlib import Path

import pytest
import torch
from assay_research.redteam.attacks import Guesses, Scene

from assay.models import load_model
from assay.poc import HFEngine, Round

T = 32


@pytest.fixture(scope="session")
def inputs_btd(small_model) -> torch.Tensor:
    engine = HFEngine(small_model, batch_size=4, seq_len=T)
    round = Round(block_hash="b", public_key="k", seq_len=T, preset="hardened")
    return engine.embeddings(round.inputs(range(4)))


@pytest.fixture(scope="session")
def guesses(small_model) -> Guesses:
    engine = HFEngine(small_model, batch_size=64, seq_len=T)
    round = Round(block_hash="own", public_key="k", seq_len=T)
    return Guesses(small_model, engine.embeddings(round.inputs(range(64))))


@pytest.fixture(scope="session")
def scene(small_model, guesses: Guesses) -> Scene:
    return Scene(model=small_model, guesses=guesses, batch_size=4, seq_len=T)


@pytest.fixture(scope="session")
def float8_scene(small_checkpoint: Path, guesses: Guesses) -> Scene:
    model = load_model(small_checkpoint, dtype="bfloat16", device="cpu", quantise="float8")
    return Scene(model=model, guesses=guesses, batch_size=4, seq_len=T)
