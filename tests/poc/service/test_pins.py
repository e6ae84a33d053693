"""``assay poc serve --pins``: what contradicts the network's agreement is refused with 409 and its
names.
"""

import hashlib
from pathlib import Path

import pytest

from assay.poc import NetworkPins
from assay.poc.service import ServiceSettings
from tests.poc.service import conftest
from tests.poc.service.conftest import ARTIFACTS, BLOCK, PARAMS, PREFIX, ROUND, Service
from tests.waiting import until

BUILD = conftest.BUILD | {"batch_size": [4, 8], "threads": 1, "kernels": ""}
AGREED = {
    "preset": "poc-2.0",
    "seq_len": 4,
    "strength": 32,
    "r_target": 1.416,
    "node_count": 1,
    "fewest_nonces": 32,
}
NODES = [
    {"public_key": "node_A", "node_id": 0},
    {"public_key": "node_B", "node_id": 1, "node_count": 2},
]


def pins(
    *, nodes=(), build=(), digest="0" * 64, measured: Path | None = None, **round: object
) -> NetworkPins:
    values = {name: value for name, value in (AGREED | round).items() if value is not None}
    model: dict[str, object] = {
        "reference": "fake",
        "digest": digest,
        "builds": [BUILD | dict(build)],
    }
    path = Path("pins.toml") if measured is None else measured.with_name("pins.toml")
    if measured is not None:
        model["calibrations"] = [
            {"file": measured.name, "sha256": hashlib.sha256(measured.read_bytes()).hexdigest()}
        ]
    return NetworkPins.of(
        {"schema": 1, "round": values, "nodes": list(nodes), "models": [model]}, path
    )


def refused(service: Service, path: str, body: object) -> list[str]:
    answer = service.post(path, body, status=409)
    assert answer["error"] == "pins mismatch"
    assert answer["detail"] == f"pins mismatch: {', '.join(answer['fields'])}"
    assert answer["wanted"]
    assert answer["requested"].keys() == set(answer["fields"])
    return answer["fields"]


def test_a_round_of_the_network_is_generated_and_another_is_refused_by_name(serving):
    with serving(pins=pins()) as service:
        for wrong, names in (
            ({"seq_len": 8}, ["seq_len"]),
            ({"r_target": 2.0, "poc_stronger_rng": True}, ["r_target", "strength"]),
            ({"use_layer_hooks": True, "use_sign_flips": False}, ["preset"]),
            ({"node_id": 1, "node_count": 2}, ["node_count"]),
            ({"n_groups": 2}, ["node_count"]),
            ({"batch_size": 16}, ["batch_size"]),
        ):
            for path in ("/init", "/init/generate", "/init/validate"):
                assert refused(service, path, ROUND | wrong) == names, path
        assert refused(service, "/init/generate", ARTIFACTS) == ["preset", "r_target"]
        assert service.status()["state"] == "IDLE"
        service.post("/init/generate", ROUND)
        assert service.status()["state"] == "GENERATING"


def test_a_block_that_the_file_names_is_the_only_one(serving):
    with serving(pins=pins(block_hash="block_beta", block_height=8)) as service:
        assert refused(service, "/init/generate", ROUND) == ["block_hash", "block_height"]
        service.post("/init/generate", ROUND | {"block_hash": "block_beta", "block_height": 8})


def test_nodes_that_are_not_listed_neither_generate_nor_are_validated(serving):
    with serving(pins=pins(nodes=NODES)) as service:
        assert refused(service, "/init/generate", ROUND | {"public_key": "node_C"}) == [
            "public_key"
        ]
        share = ROUND | {"public_key": "node_B", "node_count": 2}
        assert refused(service, "/init/generate", share) == ["node_id"]
        service.post("/init/validate", ROUND | {"public_key": "the validator", "node_count": 2})
        claim = BLOCK | {"nonces": [1], "dist": [1.4], "node_id": 1}
        assert refused(service, "/validate", claim | {"public_key": "node_C"}) == ["public_key"]
        assert refused(service, "/validate", claim | {"public_key": "node_A"}) == ["node_count"]
        another = claim | {"public_key": "node_B", "node_id": 0, "nonces": [2]}
        assert refused(service, "/validate", another) == ["node_id"]
        service.post("/validate", claim | {"public_key": "node_B"})
        service.post("/validate", claim | {"public_key": "node_B", "node_id": -1})
        # The validator's round is no round that this node may generate.
        assert refused(service, "/phase/generate", {}) == ["public_key"]
        service.post("/init/generate", share | {"node_id": 1})


def test_jobs_are_held_against_the_pins_too(serving):
    agreed = pins(preset="artifact", r_target=None, nodes=NODES, seq_len=8)
    with serving(pins=agreed, seq_len=8) as service:
        assert refused(service, "/init/generate", ROUND | {"seq_len": 8}) == ["preset"]
        job = ARTIFACTS | {"nonces": [0, 1], "wait": True, "params": PARAMS | {"seq_len": 8}}
        assert refused(service, "/generate", job | {"public_key": "node_C"}) == ["public_key"]
        assert refused(service, "/generate", job | {"poc_stronger_rng": True}) == ["strength"]
        assert refused(service, "/generate", job | {"batch_size": 2}) == ["batch_size"]
        hardened = job | {"params": PARAMS | {"seq_len": 8, "preset": "hardened", "k_dim": 32}}
        assert refused(service, "/generate", hardened) == ["preset", "strength"]
        assert service.post("/generate", job)["status"] == "completed"


def test_an_engine_of_no_agreed_build_runs_no_round(serving):
    with serving(pins=pins(build={"device": "NVIDIA H200", "torch": "2.*"})) as service:
        assert refused(service, "/init/generate", ROUND) == ["device", "torch"]
        assert (
            service.post("/init/generate", ROUND, status=409)["wanted"]
            == "device NVIDIA H200, torch 2.*"
        )
        batch = service.post("/init/generate", ROUND | {"batch_size": 16}, status=409)
        assert batch["wanted"] == "batch_size 4 or 8"


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"digest": "1" * 64}, "model '0000"),
        ({"build": {"dtype": "bfloat16"}}, "dtype float32, which its pins do not allow"),
        (
            {"preset": "artifact", "r_target": None, "seq_len": 8},
            "seq_len 4, which its pins do not allow",
        ),
    ],
)
def test_a_model_that_is_not_pinned_is_not_served(rig, tmp_path: Path, wrong, seen: str):
    settings = ServiceSettings(data_dir=tmp_path / "data", seq_len=4, pins=pins(**wrong))
    service = Service(rig, settings)
    try:
        with pytest.raises(Exception, match="pins"):
            service.controller.loaded.result(30)
        answer = service.client.get("/ready")
        assert answer.status_code == 503
        assert seen in service.client.post(f"{PREFIX}/init/generate", json=ROUND).json()["detail"]
    finally:
        service.close()


def test_a_round_does_not_continue_under_other_pins(serving, rig):
    rig.pause = 0.01
    with serving(pins=pins()) as service:
        service.post("/init/generate", ROUND)
        service.settings = service.settings.model_copy(update={"pins": pins(seq_len=8)})
        service.close()
        service.start()
        until(lambda: service.status()["state"] == "STOPPED")
        assert service.status()["error"] == "pins mismatch: seq_len"
        assert refused(service, "/phase/generate", {}) == ["seq_len"]
        service.settings = service.settings.model_copy(update={"pins": None})
        service.close()
        with pytest.raises(Exception, match="begun under pins"):
            service.start()


def test_a_file_is_read_when_the_settings_are_made(tmp_path: Path, monkeypatch):
    path = tmp_path / "pins.toml"
    build = "".join(f"{name} = {value!r}\n".replace("'", '"') for name, value in BUILD.items())
    round = "".join(f"{name} = {value!r}\n".replace("'", '"') for name, value in AGREED.items())
    model = f'[[models]]\nreference = "fake"\ndigest = "{"0" * 64}"\n[[models.builds]]\n{build}'
    path.write_text(f"schema = 1\n[round]\n{round}{model}")
    monkeypatch.setenv("ASSAY_PINS", str(path))
    read = ServiceSettings().pins
    assert (read.round, read.models) == (pins().round, pins().models)
