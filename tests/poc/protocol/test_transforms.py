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
from tests.wordings import refuses

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "poc_kat.json").read_text())
NUMPY = streams.get_backend("numpy")


def make(
    round: Round, pipeline: Pipeline | str, hidden: int, vocab: int = 96, device: str = "cpu"
) -> Transform:
    head = torch.linspace(-1, 1, vocab * hidden, device=device).view(vocab, hidden)
    return Transform(
        round,
        PIPELINES[pipeline] if isinstance(pipeline, str) else pipeline,
        hidden_size=hidden,
        vocab_size=vocab,
        device=torch.device(device),
        trained_head=lambda x_BD: project(x_BD, head),
    )


NO_SIGNS = replace(
    PIPELINES["poc-2.0"], name="without signs", hidden=PIPELINES["poc-2.0"].hidden[1:]
)


@pytest.mark.parametrize("backend", ["torch", pytest.param("numpy", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "row", VECTORS["seed_distance"], ids=lambda r: f"{r['block_hash']}-{r['nonce']}-{r['dim']}"
)
def test_distance_equals_the_known_answer(row, backend, monkeypatch):
    chosen = streams.get_backend(backend)
    monkeypatch.setattr(streams, "get_backend", lambda name, device: chosen)
    round = Round(block_hash=row["block_hash"], public_key=row["public_key"])
    dim = row["dim"]
    nonce = row["nonce"]
    hidden = NUMPY.normals(streams.seeds([f"hidden_{dim}_{nonce}"]), dim) * np.float32(
        3
    ) + np.float32(0.5)
    for pipeline, expected in (
        (PIPELINES["poc-2.0"], row["sign_flips"]),
        (NO_SIGNS, row["no_sign_flips"]),
    ):
        distance = make(round, pipeline, dim)(torch.from_numpy(hidden), round.inputs([nonce]))
        assert distance.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("preset", FORWARD)
def test_a_state_that_is_not_finite_gives_nan_throughout_and_leaves_other_rows_alone(
    preset, round_
):
    transform = make(round_, preset, 64)
    states = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    expected = transform(states, round_.inputs(range(8)))
    states[[1, 3, 6], 5] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = transform(states, round_.inputs(range(8)))
    assert found[[1, 3, 6]].isnan().all()
    others = [0, 2, 4, 5, 7]
    assert torch.equal(found[others], expected[others])


def test_a_trained_head_that_is_not_there_is_refused_before_any_nonce(round_):
    sizes = {"hidden_size": 16, "vocab_size": 96, "device": torch.device("cpu")}
    with refuses(UsageError, "a trained head that is not there is refused before any nonce"):
        Transform(round_, PIPELINES["permutation"], **sizes)


def test_shapes_in_annotations_are_checked_while_tests_run():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        project(torch.zeros(2, 3), torch.zeros(5, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", FORWARD)
def test_cuda_and_cpu_agree(preset, round_):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x_BD = torch.randn(32, 48, generator=torch.Generator().manual_seed(7)) * 4
    inputs = round_.inputs(range(32))
    expected = make(round_, preset, 48)(x_BD, inputs)
    made = make(round_, preset, 48, device="cuda")(x_BD.cuda(), inputs)
    torch.testing.assert_close(
        made.cpu(), expected, rtol=0, atol=1e-5 if made.dtype == torch.float32 else 1e-3
    )
