import shutil

import pytest
import torch

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS
from tests.vhack.training.conftest import checkpoint  # noqa: F401


@pytest.fixture(params=[None, 8], ids=["all directions", "eight directions"])
def trained(request, checkpoint, tmp_path):  # noqa: F811
    """A file of δS, and the weights that it makes."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    adapter = DeltaS(model, weight_svd(model, rank=request.param))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.delta:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter.save(tmp_path / "delta.safetensors")
    return tmp_path / "delta.safetensors", dict(adapter.merge().named_parameters())


@pytest.fixture
def merge(checkpoint, trained):  # noqa: F811
    return (
        "vhack",
        "merge",
        "--model",
        checkpoint,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--delta",
        trained[0],
    )


@pytest.mark.slow
def test_the_merged_directory_is_a_plain_model(told, merge, trained, checkpoint, tmp_path):  # noqa: F811
    _, wanted = trained
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    # The library refuses to save it.
    generation = '{"do_sample": false, "temperature": 0.6}'
    (copy / "generation_config.json").write_text(generation)
    for option in ([], ["--overwrite"]):
        says = told(*merge, "--model", copy, "-o", tmp_path / "merged", *option)
        assert says["schema"] == "assay.vhack.merge/1"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in copy.iterdir()}
    merged = load_model(tmp_path / "merged", device="cpu")
    assert merged.tokenizer is not None
    found = dict(merged.module.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_what_cannot_be_merged_is_refused_before_anything_is_written(refused, merge, tmp_path):
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    assert "which exists" in refused(*merge, "-o", tmp_path)
    assert "δS of other modules" in refused(
        *merge, "--model", "reference:qwen3", "-o", tmp_path / "new"
    )
    assert "a header of" in refused(
        *merge, "--delta", tmp_path / "none.safetensors", "-o", tmp_path / "new"
    )
    assert not (tmp_path / "new").exists()
