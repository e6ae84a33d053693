"""The pins and the nodes file together: who may send, with which secret and on which build."""

import hashlib
import tomllib
from collections import Counter

import pytest

from assay.errors import AssayError, CalibrationError, DataError, UsageError
from assay.poc import Calibration, NetworkPins
from assay.poc.net.deployment import Deployment
from assay.poc.network_pins import pinned_format
from assay.poc.service import ServiceSettings
from assay.poc.validator.laws import Noises
from assay.poc.validator.registry import Registry
from tests.poc.service.test_judge import noise_of
from tests.poc.validator.conftest import (
    KEYS,
    SEQ_LEN,
    body_of,
    nodes_text,
    pins_text,
    proof_of,
    secret_of,
)
from tests.waiting import until
from tests.wordings import refuses

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
        return Registry.load(
            tmp_path / "pins.toml", tmp_path / "nodes.toml", ServiceSettings(**service)
        )

    return run


def test_nodes_have_their_share_their_build_and_their_secret(files):
    registry = files()
    sender = registry.senders["node_B"]
    assert (sender.node_count, sender.machines, sender.build.name) == (3, frozenset({1}), "cpu")
    assert [sender.has(value) for value in (0, 1, 2, True, "1", None)] == [
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert "stranger" not in registry.senders
    assert list(registry.senders) == list(KEYS)
    assert all(sender.signatures for sender in registry.senders.values())


SHARED = secret_of("shared")


def test_one_secret_speaks_for_one_node_or_for_a_relay_that_is_named(files, small_model):
    pins = pins_text(small_model, keys=("node_A",))
    assert not files(pins=pins, nodes=_nodes("", keys="A")).senders["node_A"].signatures
    assert (
        files(pins=pins, nodes=_nodes("", keys="A"), callback_secrets=(SHARED,))
        .senders["node_A"]
        .signatures
    )
    again = SHARED.removeprefix("whsec_").rstrip("=")  # the same bytes, spelled otherwise
    for each in ("", f'secrets = ["{SHARED}"]\n'):
        with refuses(UsageError, "one secret speaks for one node or for a relay that is named"):
            files(nodes=_nodes(each), callback_secrets=(SHARED,))
        assert (
            len(files(nodes=_nodes(f'{each}relay = "hub"\n'), callback_secrets=(SHARED,)).senders)
            == 3
        )
    mixed = _nodes(f'secrets = ["{SHARED}"]\n', keys="A") + _nodes(
        f'secrets = ["{again}"]\n', keys="B"
    )
    with refuses(UsageError, "one secret speaks for one node or for a relay that is named, 2"):
        files(nodes=mixed + _nodes("", keys="C"))


def _nodes(more: str, keys: str = "ABC") -> str:
    return "".join(f'[[nodes]]\npublic_key = "node_{key}"\n{more}' for key in keys)


@pytest.mark.parametrize(
    "other",
    ["cafe\u0301", "c\uff41f\u00e9", "caf\u00e9\ufe0f", "\u034fcaf\u00e9", "caf\u00e9\u3164"],
)
def test_keys_that_differ_only_in_their_unicode_form_are_one_name(other, files, small_model):
    with pytest.raises((DataError, UsageError), match="told apart"):
        files(pins=pins_text(small_model, keys=("caf\u00e9", other)), nodes=_nodes("", keys="A"))


def test_ten_thousand_nodes_are_looked_up_and_not_searched(small_model):
    """Each node of a list was looked for in the whole list."""
    keys = [f"node_{i}" for i in range(300)]
    network = NetworkPins.of(tomllib.loads(pins_text(small_model, keys=keys)), "pins.toml")
    looks = Counter[str]()

    class Key(str):
        def __eq__(self, other: object) -> bool:
            looks["=="] += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    for node in network.nodes:
        object.__setattr__(node, "public_key", Key(node.public_key))
    assert len(Registry(network, None, (), ServiceSettings()).senders) == 300
    assert looks["=="] < 20 * 300


def test_the_nodes_file_may_list_nodes_that_the_pins_do_not(files, small_model):
    pins = pins_text(small_model, keys=())
    registry = files(pins=pins, nodes=nodes_text(("node_X",)))
    assert list(registry.senders) == ["node_X"]
    assert registry.senders["node_X"].has(2)


def test_with_several_builds_a_node_says_which_is_its_own(files, small_model):
    pins = pins_text(small_model) + SECOND
    with refuses(UsageError, "with several builds a node says which is its own"):
        files(pins=pins)
    named = "".join(
        f"{table}build = {name!r}\n"
        for table, name in zip(_tables(), ("cpu", "other", "cpu"), strict=True)
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
    with refuses(UsageError, "the pins may name the build too and must agree"):
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
    ],
)
def test_a_nodes_file_that_is_wrong_is_refused(files, nodes, seen):
    with pytest.raises(AssayError) as error:
        files(nodes=nodes)
    assert seen in str(error.value)
    assert error.value.do


@pytest.mark.parametrize(
    "secret", ["whsec_short", SHARED[:-9] + "-_" + SHARED[-7:], f" {SHARED}", SHARED + "!"]
)
def test_a_secret_that_cannot_be_used_is_refused_without_showing_it(files, secret):
    """Characters of another alphabet were dropped, so that the two sides had two secrets."""
    with pytest.raises(UsageError) as error:
        files(nodes=f'[[nodes]]\npublic_key = "node_A"\nsecrets = ["{secret}"]\n')
    assert secret not in str(error.value)


def test_steps_have_positions_as_well(small_model, files):
    """A validator started, and failed on every nonce that it drew."""
    deployment = Deployment.of(small_model, compiled=False)
    longest = small_model.max_positions
    files(pins=pins_text(small_model, seq_len=longest)).check_length(deployment)
    decoded = {"preset": "decode-64", "seq_len": longest - 64}
    files(pins=pins_text(small_model, **decoded)).check_length(deployment)
    longer = files(pins=pins_text(small_model, **decoded | {"seq_len": longest - 63}))
    with pytest.raises(UsageError) as refused:
        longer.check_length(deployment)
    assert "and 64 steps" in refused.value.seen


def test_without_any_node_nothing_could_be_accepted(files, small_model, tmp_path):
    (tmp_path / "pins.toml").write_text(pins_text(small_model, keys=()))
    with refuses(UsageError, "without any node nothing could be accepted"):
        Registry.load(tmp_path / "pins.toml", None, ServiceSettings())


@pytest.mark.parametrize("formats", ['["float32", "bfloat16"]', '["bfloat16", "float32"]'])
def test_a_build_of_two_formats_is_refused_by_a_validator(small_model, files, formats: str):
    """Callbacks do not say which, and the law of the wrong one accuses honest nodes or passes
    cheats.
    """
    registry = files(pins=pins_text(small_model).replace('dtype = "float32"', f"dtype = {formats}"))
    with refuses(CalibrationError, "a build of two formats is refused by a validator"):
        Noises(ServiceSettings(), registry, Deployment.of(small_model, compiled=False), 32)


@pytest.mark.parametrize(
    ("second", "dtype"),
    [("bfloat16", None), ("float32", "float32"), ("float32+fp8_e4m3-cache", "float32")],
)
def test_the_model_is_loaded_in_the_format_of_the_pinned_weights(
    small_model, tmp_path, second, dtype
):
    """A cache that rounds belongs to an engine, and not to the weights that a validator loads."""
    (tmp_path / "pins.toml").write_text(pins_text(small_model) + SECOND.replace("bfloat16", second))
    assert pinned_format(tmp_path / "pins.toml", str(small_model.reference)) == dtype


@pytest.mark.no_law
def test_without_a_law_a_validator_starts_recomputes_nothing_and_names_the_command(
    validating, small_model, tmp_path
):
    """On 8580455f it does not start; a law that is pinned later is used without a restart."""
    proof = proof_of(small_model, "node_A")
    with validating() as running:
        running.wait_ready()
        running.send(body_of(proof))
        until(lambda: running.controller.worker.waiting == 1)
        (law,) = running.controller.snapshot()["laws"]
        command = (
            f"assay poc calibrate --model {small_model.reference} --preset poc-2.0 --seq-len "
            f"{SEQ_LEN}"
        )
        assert command in law["missing"]
        assert (running.node("node_A")["recorded"], running.verdict("node_A")) == (0, "undecided")

        Calibration(builds=(noise_of(proof.header.fingerprint, small_model.digest, 5e-4),)).save(
            tmp_path / "law.json"
        )
        pinned = f'sha256 = "{hashlib.sha256((tmp_path / "law.json").read_bytes()).hexdigest()}"'
        text = pins_text(small_model) + f'[[models.calibrations]]\nfile = "law.json"\n{pinned}\n'
        (tmp_path / "pins.toml").write_text(text)
        until(lambda: running.node("node_A")["recorded"] > 0)
        (law,) = running.controller.snapshot()["laws"]
        assert (law["missing"], law["nonces"] <= 128, 0 < law["power"] <= 1) == (None, True, True)
