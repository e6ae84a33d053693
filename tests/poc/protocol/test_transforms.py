"""The transform against the known answers, and against the formulas written out in float64."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from assay import streams
from assay.errors import UsageError
from assay.poc import PIPELINES, Pipeline, Round
from assay.poc.protocol.pipelines import FORWARD
from assay.poc.protocol.transforms import Transform, project

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "poc_kat.json").read_text())
NUMPY = streams.get_backend("numpy")


def make(round: Round, pipeline: Pipeline | str, hidden: int, vocab: int = 96, device: str = "cpu") -> Transform:
    head = torch.linspace(-1, 1, vocab * hidden, device=device).view(vocab, hidden)
    return Transform(
        round,
        PIPELINES[pipeline] if isinstance(pipeline, str) else pipeline,
        hidden_size=hidden,
        vocab_size=vocab,
        device=torch.device(device),
        trained_head=lambda x_BD: project(x_BD, head),
    )


NO_SIGNS = replace(PIPELINES["poc-2.0"], name="without signs", hidden=PIPELINES["poc-2.0"].hidden[1:])


@pytest.mark.parametrize("backend", ["torch", pytest.param("numpy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", VECTORS["seed_distance"], ids=lambda r: f"{r['block_hash']}-{r['nonce']}-{r['dim']}")
def test_distance_equals_the_known_answer(row, backend, monkeypatch):
    chosen = streams.get_backend(backend)
    monkeypatch.setattr(streams, "get_backend", lambda name, device: chosen)
    round = Round(block_hash=row["block_hash"], public_key=row["public_key"])
    dim, nonce = row["dim"], row["nonce"]
    hidden = NUMPY.normals(streams.seeds([f"hidden_{dim}_{nonce}"]), dim) * np.float32(3) + np.float32(0.5)
    for pipeline, expected in ((PIPELINES["poc-2.0"], row["sign_flips"]), (NO_SIGNS, row["no_sign_flips"])):
        distance = make(round, pipeline, dim)(torch.from_numpy(hidden), [nonce])
        assert distance.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("preset", FORWARD)
def test_rows_do_not_mix_and_repeat_to_the_bit(preset, round_):
    x_BD = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    transform = make(round_, preset, 32)
    whole = transform(x_BD, range(6))
    order = [4, 0, 5, 1, 3, 2]
    shuffled = transform(x_BD[order], order)
    assert torch.equal(whole[order], shuffled)
    assert torch.isfinite(whole.float()).all()
    if whole.ndim == 1:
        assert ((whole >= 0) & (whole <= 2)).all()


@pytest.mark.parametrize("preset", FORWARD)
def test_a_state_that_is_not_finite_gives_nan_throughout_and_leaves_other_rows_alone(preset, round_):
    transform, states = make(round_, preset, 64), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    expected = transform(states, range(8))
    states[[1, 3, 6], 5] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = transform(states, range(8))
    assert found[[1, 3, 6]].isnan().all()
    others = [0, 2, 4, 5, 7]
    assert torch.equal(found[others], expected[others])


def test_a_trained_head_that_is_not_there_is_refused_before_any_nonce(round_):
    sizes = {"hidden_size": 16, "vocab_size": 96, "device": torch.device("cpu")}
    with pytest.raises(UsageError, match="the pipeline permutation, which needs the trained head"):
        Transform(round_, PIPELINES["permutation"], **sizes)


def test_shapes_in_annotations_are_checked_while_tests_run():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        project(torch.zeros(2, 3), torch.zeros(5, 4))


class Fusing(type(NUMPY)):
    """A backend with reflections of its own: in float64, and remembering what it was asked."""

    def _reflected(self, x_BD, seeds_BR):
        self.seeds_BR = seeds_BR
        x = x_BD.double().numpy()
        for r in range(seeds_BR.shape[1]):
            v = self.normals(seeds_BR[:, r], x.shape[1]).astype(np.float64)
            x = x - 2 * ((x * v).sum(1) / (v * v).sum(1))[:, None] * v
        return torch.from_numpy(x).float()


@pytest.mark.parametrize(
    ("preset", "stream", "k", "count"), [("poc-2.0", "reflection", 0, 8), ("artifact", "rotation", 12, 11)]
)
def test_fused_reflections_give_the_same(preset, stream, k, count, round_, monkeypatch):
    x_BD = torch.randn(5, 48, generator=torch.Generator().manual_seed(6))
    expected = make(round_, preset, 48)(x_BD, range(5))
    fusing = Fusing("cpu")
    monkeypatch.setattr(streams, "get_backend", lambda name, device: fusing)
    made = make(round_, preset, 48)(x_BD, range(5))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6 if made.dtype == torch.float32 else 1e-3)
    texts = [round_.text(stream, nonce, index=r, k=k) for nonce in range(5) for r in range(count)]
    np.testing.assert_array_equal(fusing.seeds_BR, streams.seeds(texts).reshape(5, count))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", FORWARD)
def test_cuda_and_cpu_agree(preset, round_):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x_BD = torch.randn(32, 48, generator=torch.Generator().manual_seed(7)) * 4
    expected = make(round_, preset, 48)(x_BD, range(32))
    made = make(round_, preset, 48, device="cuda")(x_BD.cuda(), range(32))
    torch.testing.assert_close(made.cpu(), expected, rtol=0, atol=1e-5 if made.dtype == torch.float32 else 1e-3)
