from pathlib import Path

import pytest
import torch

from assay.errors import StorageError, UsageError
from assay.models import load_model, save_random
from assay.models import save as _save


@pytest.mark.parametrize("mode", ["random-all", "random-embed"])
def test_a_saved_checkpoint_loads_to_the_same_bits(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    made = load_model(checkpoint, device="cpu", weights=mode, block_hash="b")
    path = save_random(checkpoint, tmp_path / "sub" / "random", weights=mode, block_hash="b")
    loaded = load_model(path, device="cpu")
    for (name, a), (other, b) in zip(made.module.named_parameters(), loaded.module.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_dtype_and_tokenizer_go_with_it(tmp_path: Path) -> None:
    path = save_random("reference:llama", tmp_path / "r", weights="random-all", block_hash="b", dtype="float16")
    model = load_model(path, device="cpu")
    assert model.dtype == torch.float16
    assert model.tokenizer is not None
    assert (
        model.tokenizer("def f():\n")["input_ids"] == load_model("reference:llama").tokenizer("def f():\n")["input_ids"]
    )


def test_trained_weights_and_existing_paths_are_usage_errors(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trained"):
        save_random(checkpoint, tmp_path / "r", weights="trained")
    with pytest.raises(UsageError, match="exists"):
        save_random(checkpoint, checkpoint, weights="random-all", block_hash="b")


def test_a_failed_write_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    model = load_model(checkpoint, device="cpu", weights="random-all", block_hash="b")
    monkeypatch.setattr(model.module, "save_pretrained", full)
    monkeypatch.setattr(_save, "load_model", lambda *a, **k: model)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="No space left"):
        save_random(checkpoint, tmp_path / "r", weights="random-all", block_hash="b")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_in_the_way_of_the_parent(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_random(checkpoint, tmp_path / "file" / "r", weights="random-all", block_hash="b")
