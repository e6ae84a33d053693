"""The settings: one class behind the flags, the environment and the plugin."""

import pytest

from assay.errors import AssayError, UsageError
from assay.poc.service import ServiceSettings
from assay.poc.vllm.preflight import PluginSettings
from tests.wordings import refuses

KEY = "k" * 20
OTHER = "o" * 20


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No setting comes from the machine that runs the tests."""
    for name in ServiceSettings.model_fields:
        monkeypatch.delenv(ServiceSettings.environment_name(name), raising=False)


def test_the_environment_is_read(monkeypatch, tmp_path):
    values = {
        "API_KEY": f"{KEY} {OTHER}",
        "DRAIN": "3",
        "ALLOW_PRIVATE_CALLBACKS": "yes",
        "MAX_BODY": "77",
        "DATA_DIR": str(tmp_path),
    }
    for name, value in values.items():
        monkeypatch.setenv(f"ASSAY_{name}", value)
    read = ServiceSettings()
    assert (read.api_keys, read.drain, read.allow_private_callbacks) == ((KEY, OTHER), 3.0, True)
    assert (read.max_body, read.data_dir) == (77, tmp_path)


def test_the_keys_of_a_file_are_added(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n\n{OTHER}\n")
    assert ServiceSettings(api_keys=("x" * 16,), api_key_file=path).api_keys == (
        "x" * 16,
        KEY,
        OTHER,
    )
    path.write_text("short")
    with refuses(UsageError, "the keys of a file are added"):
        ServiceSettings(api_key_file=path)
    path.write_text("\n")
    with refuses(UsageError, "the keys of a file are added, 2"):
        ServiceSettings(api_key_file=path)


@pytest.mark.parametrize(
    "values",
    [
        {"max_body": 0},
        {"max_body": "many"},
        {"drain": float("inf")},
        {"alpha": 0.0},
        {"unknown": 1},
        {"api_keys": 5},
        *({name: "/nowhere"} for name in ("calibration", "pins", "api_key_file")),
    ],
)
def test_a_wrong_value_is_an_error_in_three_parts(values):
    with pytest.raises(AssayError) as error:
        ServiceSettings(**values)
    assert error.value.seen
    assert error.value.wanted
    assert error.value.do


def test_an_option_is_stronger_than_the_environment_and_that_than_the_file(monkeypatch, tmp_path):
    from assay.cli import run
    from assay.poc.service import service_api as app

    seen = []
    monkeypatch.setattr(app, "serve", lambda load, settings, **kwargs: seen.append(settings))
    monkeypatch.setenv("ASSAY_DRAIN", "3")
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "variable"))
    monkeypatch.setenv("ASSAY_MAX_PENDING", "5")
    monkeypatch.setenv("ASSAY_API_KEY", KEY)
    config = tmp_path / "serve.toml"
    config.write_text("[poc.serve]\ndrain = 2.0\nmax_pending = 9\nmax_streams = 6\n")
    command = ["poc", "serve", "--model", "reference:qwen3", "--config", str(config)]
    assert run(command) == run([*command, "--data-dir", str(tmp_path / "flag")]) == 0
    assert [(s.drain, s.max_pending, s.max_streams, s.api_keys) for s in seen] == [
        (3.0, 5, 6, (KEY,)),
        (3.0, 5, 6, (KEY,)),
    ]
    assert [s.data_dir for s in seen] == [tmp_path / "variable", tmp_path / "flag"]


@pytest.mark.parametrize("text", ["nan", "{", "\u0663", "x" * 10_000])
def test_a_variable_of_a_setting_with_parts_that_is_no_value_is_refused_in_words(monkeypatch, text):
    monkeypatch.setenv("ASSAY_THROTTLE", text)
    with pytest.raises(UsageError) as refused:
        PluginSettings()
    assert "throttle" in refused.value.seen
