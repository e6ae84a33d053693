import pytest
import torch
from assay_research.redteam.experts import (
    ASKED,
    EXPERTS_SAVED,
    experts,
    experts_cost,
    make_experts,
    without_light_experts,
)

from assay.models import Model, load_model
from assay.models.decoder import decoder_layers
from assay.poc import HFEngine

T, LAYERS = 16, 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_experts(tmp_path_factory.mktemp("mixture")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def inputs_btd() -> torch.Tensor:
    return torch.randn(4, T, 128, generator=torch.Generator().manual_seed(0))


def last(model: Model, inputs: torch.Tensor) -> torch.Tensor:
    return HFEngine(model, batch_size=4, seq_len=T).read(inputs)


def weights_of(model: Model, inputs: torch.Tensor) -> list[torch.Tensor]:
    """What the routers of a model give to the experts of every position, layer by layer."""
    seen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in decoder_layers(model.module)]
    handles = [gate.register_forward_hook(lambda m, a, output: seen.append(output[1])) for gate in gates]
    last(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_no_share_is_the_honest_model(mixture, inputs_btd):
    assert torch.equal(last(without_light_experts(mixture, (0,) * LAYERS), inputs_btd), last(mixture, inputs_btd))


def test_the_wanted_share_of_the_lightest_pairs_is_left_out(mixture, inputs_btd):
    honest = weights_of(mixture, inputs_btd)
    shares = (0.5, 0.25, 0.125, 0.75)
    lighter = weights_of(without_light_experts(mixture, shares), inputs_btd)
    for share, weights in zip(shares, lighter, strict=True):
        assert (weights == 0).float().mean() == pytest.approx(share, abs=0.01)
    first, kept = honest[0], lighter[0] > 0  # later layers have other inputs
    assert torch.equal(lighter[0][kept], first[kept]), "the others keep their weight"
    assert first[~kept].max() <= first[kept].min()


def test_cost_counts_the_experts_that_are_asked(mixture):
    assert experts_cost(ASKED) == 1
    assert experts_cost(1) < experts_cost(2) < 1
    for shares in EXPERTS_SAVED.values():
        assert experts_cost(ASKED * (1 - sum(shares) / len(shares))) == pytest.approx(0.75)


def test_every_prover_is_in_the_table():
    rows = {row["name"]: row for row in experts(batch_size=4, nonces=4, dtypes=("bfloat16", "float16"))["rows"]}
    honest, closer = rows.pop("honest, bfloat16"), rows.pop("honest, float16")
    assert 0 < 2 * closer["artifact"] < honest["artifact"]
    assert {f"{name} left out" for name in EXPERTS_SAVED} < rows.keys()
    for name in EXPERTS_SAVED:
        assert rows[f"{name} left out"]["hardened"] > 2 * honest["hardened"]
