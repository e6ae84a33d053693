"""The pins and the nodes file together: who may send, with which secret and on which build."""

import hashlib

import pytest

from assay.errors import AssayError, CalibrationError, UsageError
from assay.poc import Calibration
from assay.poc.net.deployment import Deployment
from assay.poc.network_pins import pinned_format
from assay.poc.service import Settings
from assay.poc.validator.registry import Noises, Registry
from tests.poc.service.test_judge import noise_of
from tests.poc.validator.conftest import KEYS, SEQ_LEN, body_of, nodes_text, pins_text, proof_of, secret_of
from tests.waiting import until

SECOND = """[[models.builds]]
name = "other"
engine = "vllm"
dtype = "bfloat16"
device = "*"
attention = "*"
batch_size = 32
threads = 0
torch = "*"
library = "*"
kernels = "*"
"""


@pytest.fixture
def files(small_model, tmp_path):
    """Write pins and nodes, and read them."""

    def run(pins: str | None = None, nodes: str | None = None, **service) -> Registry:
        (tmp_path / "pins.toml").write_text(pins or pins_text(small_model))
        (tmp_path / "nodes.toml").write_text(nodes or nodes_text())
        return Registry.load(tmp_path / "pins.toml", tmp_path / "nodes.toml", Settings(**service))

    return run


def test_nodes_have_their_share_their_build_and_their_secret(files):
    registry = files()
    sender = registry.senders["node_B"]
    assert (sender.node_count, sender.machines, sender.build.name) == (3, frozenset({1}), "cpu")
    assert [sender.has(value) for value in (0, 1, 2, True, "1", None)] == [False, True, False, False, False, False]
    assert "stranger" not in registry.senders
    assert list(registry.senders) == list(KEYS)
    assert all(sender.signatures for sender in registry.senders.values())


def test_a_node_without_a_secret_of_its_own_has_the_shared_one(files):
    nodes = '[[nodes]]\npublic_key = "node_A"\n'
    assert not files(nodes=nodes).senders["node_A"].signatures
    assert files(nodes=nodes, callback_secrets=(secret_of("shared"),)).senders["node_A"].signatures


def test_the_nodes_file_may_list_nodes_that_the_pins_do_not(files, small_model):
    pins = pins_text(small_model, keys=())
    registry = files(pins=pins, nodes=nodes_text(("node_X",)))
    assert list(registry.senders) == ["node_X"]
    assert registry.senders["node_X"].has(2)


def test_with_several_builds_a_node_says_which_is_its_own(files, small_model):
    pins = pins_text(small_model) + SECOND
    with pytest.raises(UsageError, match="build"):
        files(pins=pins)
    named = "".join(
        f"{table}build = {name!r}\n" for table, name in zip(_tables(), ("cpu", "other", "cpu"), strict=True)
    )
    registry = files(pins=pins, nodes=named)
    assert [registry.senders[key].build.name for key in KEYS] == ["cpu", "other", "cpu"]
    assert registry.senders["node_B"].build.dtype == ("bfloat16",)


def test_the_pins_may_name_the_build_too_and_must_agree(files, small_model):
    pins = pins_text(small_model).replace("node_id = 1", 'node_id = 1\nbuild = "other"') + SECOND
    nodes = "".join(
        f"{table}build = {name!r}\n" if name else table
        for table, name in zip(_tables(), ("cpu", "", "cpu"), strict=True)
    )
    assert files(pins=pins, nodes=nodes).senders["node_B"].build.name == "other"
    with pytest.raises(UsageError, match="cpu, other"):
        files(pins=pins, nodes="".join(f"{table}build = 'cpu'\n" for table in _tables()))


def _tables() -> list[str]:
    return [f'[[nodes]]\npublic_key = "{key}"\nsecrets = ["{secret_of(key)}"]\n' for key in KEYS]


@pytest.mark.parametrize(
    ("nodes", "seen"),
    [
        ("[[nodes]]\n", "public_key"),
        ('[[nodes]]\npublic_key = "a"\nbuilt = "x"\n', "built"),
        ('[[nodes]]\npublic_key = "a"\nsecrets = []\n', "secrets"),
        ('[[nodes]]\npublic_key = "a"\n[[nodes]]\npublic_key = "a"\n', "twice"),
        ("nodes = 7", "nodes"),
        ("nonsense", "nodes.toml"),
        ('[[nodes]]\npublic_key = "a"\nbuild = "none"\n', "build"),
        ('[[nodes]]\npublic_key = "a"\nsecrets = ["whsec_short"]\n', "secret"),
    ],
)
def test_a_nodes_file_that_is_wrong_is_refused_and_its_secrets_are_not_shown(files, nodes, seen):
    with pytest.raises(AssayError) as error:
        files(nodes=nodes)
    assert seen in str(error.value)
    assert "whsec_short" not in str(error.value)
    assert error.value.do


def test_without_any_node_nothing_could_be_accepted(files, small_model, tmp_path):
    (tmp_path / "pins.toml").write_text(pins_text(small_model, keys=()))
    with pytest.raises(UsageError, match="list no node"):
        Registry.load(tmp_path / "pins.toml", None, Settings())


@pytest.mark.parametrize("formats", ['["float32", "bfloat16"]', '["bfloat16", "float32"]'])
def test_a_build_of_two_formats_is_refused_by_a_validator(small_model, files, formats: str):
    """Callbacks do not say which, and the law of the wrong one accuses honest nodes or passes cheats."""
    registry = files(pins=pins_text(small_model).replace('dtype = "float32"', f"dtype = {formats}"))
    with pytest.raises(CalibrationError, match=r"the build 'cpu' of (float32|bfloat16) and"):
        Noises(Settings(), registry, Deployment.of(small_model, compiled=False))


@pytest.mark.parametrize(
    ("second", "dtype"), [("bfloat16", None), ("float32", "float32"), ("float32+fp8_e4m3-cache", "float32")]
)
def test_the_model_is_loaded_in_the_format_of_the_pinned_weights(small_model, tmp_path, second, dtype):
    """A cache that rounds belongs to an engine, and not to the weights that a validator loads."""
    (tmp_path / "pins.toml").write_text(pins_text(small_model) + SECOND.replace("bfloat16", second))
    assert pinned_format(tmp_path / "pins.toml", str(small_model.reference)) == dtype


@pytest.mark.no_law
def test_without_a_law_a_validator_starts_recomputes_nothing_and_names_the_command(validating, small_model, tmp_path):
    """On 8580455f it does not start; a law that is pinned later is used without a restart."""
    proof = proof_of(small_model, "node_A")
    with validating() as running:
        running.wait_ready()
        running.send(body_of(proof))
        until(lambda: running.controller.worker.waiting == 1)
        (law,) = running.controller.snapshot()["laws"]
        command = f"assay poc calibrate --model {small_model.reference} --preset poc-2.0 --seq-len {SEQ_LEN}"
        assert command in law["missing"]
        assert (running.node("node_A")["recorded"], running.verdict("node_A")) == (0, "undecided")

        Calibration(builds=(noise_of(proof.header.fingerprint, small_model.digest, 5e-4),)).save(tmp_path / "law.json")
        pinned = f'sha256 = "{hashlib.sha256((tmp_path / "law.json").read_bytes()).hexdigest()}"'
        text = pins_text(small_model) + f'[[models.calibrations]]\nfile = "law.json"\n{pinned}\n'
        (tmp_path / "pins.toml").write_text(text)
        until(lambda: running.node("node_A")["recorded"] > 0)
        (law,) = running.controller.snapshot()["laws"]
        assert (law["missing"], law["nonces"] <= 128, 0 < law["power"] <= 1) == (None, True, True)
