from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from assay.errors import ModelError, ModelNotFound, UnsafeCheckpoint
from assay.models import load_model, model_info
from assay.models import resolve as _resolve
from tests.models.storing import configure


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resolve, "_cached", lambda hub_id: None)


def answer(monkeypatch: pytest.MonkeyPatch, names: list[str] | Exception) -> None:
    """Makes the hub publish files of these names, or fail."""

    def model_info(self: object, hub_id: str, *, timeout: float) -> SimpleNamespace:
        assert timeout <= 10
        if isinstance(names, Exception):
            raise names
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    monkeypatch.setattr(_resolve.HfApi, "model_info", model_info)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("reference:qwen", "reference:qwen3"),
        ("reference:lama", "reference:llama"),
        ("shape:qwen3-0.6B", "shape:qwen3-0.6b"),
        ("shape:llama3.1-8b", "shape:llama-3.1-8b"),
    ],
)
def test_a_wrong_bundled_name_gets_a_suggestion(wrong: str, meant: str) -> None:
    with pytest.raises(ModelNotFound, match=f"did you mean '{meant}'"):
        load_model(wrong)


@pytest.mark.parametrize(
    ("bare", "meant"),
    [("qwen3", "reference:qwen3"), ("organism", "reference:organism"), ("qwen3-4b", "shape:qwen3-4b")],
)
def test_a_bundled_name_without_its_prefix_gets_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bare: str, meant: str
) -> None:
    answer(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=f"did you mean '{meant}'"):
        load_model(bare)
    (tmp_path / bare).mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):  # a directory of that name is the directory
        load_model(bare)


@pytest.mark.usefixtures("no_cache")
def test_an_unknown_name_gets_a_suggestion_too(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, httpx.ConnectTimeout("timed out"))
    with pytest.raises(ModelNotFound, match="did you mean 'reference:llama'"):
        load_model("lama")


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "a/b/c", "../absent", "~absent/model"])
def test_a_missing_directory_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    answer(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(ModelNotFound, match="no directory"):
        load_model(path)


def test_a_missing_path_object_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(ModelNotFound, match="no directory"):
        load_model(Path("owner/name"))


def test_a_file_is_no_model(checkpoint: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file"):
        load_model(checkpoint / "model.safetensors")


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_an_unreadable_configuration(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": "vit"}, "vit"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_a_configuration_that_cannot_be_used(checkpoint: Path, settings: dict[str, object], says: str) -> None:
    configure(checkpoint, **settings)
    with pytest.raises(ModelError, match=says):
        load_model(checkpoint)


def test_code_that_comes_with_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    configure(checkpoint, model_type="custom", auto_map={"AutoConfig": "evil.Config"})
    (checkpoint / "evil.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ModelError, match="custom"):
        load_model(checkpoint)


def test_an_adapter_is_refused(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        load_model(checkpoint)


@pytest.mark.usefixtures("no_cache")
def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, httpx.ConnectTimeout("timed out"))
    with pytest.raises(ModelNotFound, match="timed out"):
        load_model("owner/name")


@pytest.mark.usefixtures("no_cache")
def test_a_hub_model_that_is_a_pickle_is_refused_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ["config.json", "pytorch_model.bin"])
    monkeypatch.setattr(_resolve, "snapshot_download", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin"):
        load_model("owner/name")


def test_a_whole_copy_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    answer(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.setattr(_resolve, "snapshot_download", lambda *a, **k: str(checkpoint))
    assert load_model("owner/name", device="cpu").digest == load_model(checkpoint, device="cpu").digest


def test_half_a_copy_in_the_cache_is_completed(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    calls = []

    def snapshot_download(hub_id: str, *, local_files_only: bool = False, **options: object) -> str:
        calls.append(local_files_only)
        return str(checkpoint.parent if local_files_only else checkpoint)

    answer(monkeypatch, ["config.json", "model.safetensors"])
    monkeypatch.setattr(_resolve, "snapshot_download", snapshot_download)
    assert model_info("owner/name").reference == "owner/name"
    assert calls == [True, False]
