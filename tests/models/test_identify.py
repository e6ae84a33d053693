from pathlib import Path

import pytest
import torch

from assay.errors import ModelNotFound, UsageError
from assay.models import load_model
from assay.models.load import identify
from assay.models.resolve import checkpoint_directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_named_as_if_it_had_been_loaded_and_takes_no_memory(checkpoint: Path, dtype: str) -> None:
    named, loaded = identify(checkpoint, dtype=dtype), load_model(checkpoint, dtype=dtype, device="cpu")
    assert named.device == torch.device("meta")
    for fact in ("digest", "weights", "reference", "dtype", "architecture", "hidden_size", "num_layers", "vocab_size"):
        assert getattr(named, fact) == getattr(loaded, fact)


def test_a_reference_leads_to_its_directory(checkpoint: Path) -> None:
    assert checkpoint_directory(checkpoint) == checkpoint
    assert (checkpoint_directory("reference:qwen3") / "model.safetensors").is_file()


def test_a_shape_has_no_checkpoint_and_nothing_has_none_either(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="models random"):
        identify("shape:qwen3-0.6b", dtype="float32")
    with pytest.raises(ModelNotFound):
        checkpoint_directory(tmp_path / "nothing")
