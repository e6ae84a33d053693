"""Bytes of random numbers are those that a transform really draws."""

import numpy as np
import pytest
import torch
from assay_research.approaches.approaches import memory

from assay.poc import PIPELINES, Round
from assay.poc.protocol.pipelines import FORWARD
from assay.poc.protocol.transforms import Transform

HIDDEN, VOCAB, LAYERS, POSITIONS = 32, 50, 3, 20
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_layers": LAYERS, "seq_len": POSITIONS}


class Counting:
    """A backend that counts the bytes it gives out."""

    def __init__(self, backend) -> None:
        self._backend, self.bytes = backend, 0

    def __getattr__(self, name):
        draw = getattr(self._backend, name)

        def counted(*arguments):
            values = draw(*arguments)
            if values is not None:  # there is no kernel of its own for reflections
                self.bytes += np.asarray(values).nbytes
            return values

        return counted


def drawn(pipeline) -> int:
    round = Round(block_hash="b", public_key="k", preset=pipeline.name)
    transform = Transform(
        round,
        pipeline,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        trained_head=lambda x_BD: x_BD @ torch.ones(HIDDEN, VOCAB) + torch.arange(VOCAB),
    )
    transform._backend = counting = Counting(transform._backend)
    transform.weights([0, 1], POSITIONS)
    transform(torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0)), [0, 1])
    return counting.bytes // 2


@pytest.mark.parametrize("pipeline", [PIPELINES[name] for name in FORWARD], ids=lambda pipeline: pipeline.name)
def test_bytes_per_nonce_are_those_that_are_drawn(pipeline):
    assert memory(pipeline, **SIZES)["bytes_per_nonce"] == drawn(pipeline)


def test_the_published_figures():
    """Seed table, for 1024 wide states, 28 layers and a vocabulary of 151 936."""
    sizes = {"hidden_size": 1024, "vocab_size": 151_936, "num_layers": 28, "seq_len": 256}
    mega = {name: memory(pipeline, **sizes) for name, pipeline in PIPELINES.items() if name in FORWARD}
    assert mega["permutation"]["bytes_per_nonce"] / 1e6 == pytest.approx(1.2, abs=0.02)
    assert mega["logit-reflections"]["bytes_per_nonce"] / 1e6 == pytest.approx(4.86, abs=0.01)
    assert mega["hidden-reflections"]["bytes_per_nonce"] == 32 * 1024
    assert mega["random-head"]["bytes_per_block"] / 1e6 == pytest.approx(33.6, abs=0.1)
    layers = mega["layer-signs"]["bytes_per_block"] - mega["permutation"]["bytes_per_block"]
    assert layers == 112 * 1024
