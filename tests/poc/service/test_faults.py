"""The faults of the first published service, each with the test that keeps it away. Numbers are
those of the report.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from assay.poc.engines.hf import engine as _outputs
from assay.poc.service.jobs import Jobs
from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ARTIFACTS, BLOCK, PREFIX, ROUND, TestClient
from tests.waiting import until

CLAIM = BLOCK | {"node_id": 0}


def computed(service, nonces: list[int]) -> list[float]:
    """The distances that an honest prover of the fake model has."""
    body = CLAIM | {"nonces": nonces, "dist": [1.4] * len(nonces)}
    return service.post("/validate", body)["computed_distances"]


def test_fault_03_init_without_ids_has_no_negative_nonces(service):
    body = {name: value for name, value in ROUND.items() if name not in ("node_id", "node_count")}
    service.post("/init", body)
    service.post("/phase/generate")
    until(lambda: service.checked() >= 8)
    service.post("/stop")
    found = service.client.get(f"{PREFIX}/status", params={"after": -1}).json()["valid_nonces"]
    assert found
    assert min(found) >= 0
    service.post("/init/generate", body | {"public_key": "B"}, status=400)


@pytest.mark.slow
def test_fault_06_the_binomial_rule_decides_and_not_one_flip(service):
    service.post("/init/validate", ROUND | {"fraud_threshold": 0.01})
    many = list(range(400))
    honest = computed(service, many)
    valid = [(n, d) for n, d in zip(many, honest, strict=True) if d < ROUND["r_target"]]
    nonces = [n for n, _ in valid]
    dist = [d for _, d in valid]
    clean = service.post("/validate", CLAIM | {"nonces": nonces, "dist": dist})
    assert (clean["n_invalid"], clean["probability_honest"], clean["fraud_detected"]) == (
        0,
        1.0,
        False,
    )
    flipped = [1.5, *dist[1:]]
    one = service.post("/validate", CLAIM | {"nonces": nonces, "dist": flipped})
    assert (one["n_invalid"], one["fraud_detected"]) == (1, False)
    assert one["probability_honest"] == pytest.approx(1 - (1 - 5e-4) ** len(nonces), rel=1e-6)
    two = service.post("/validate", CLAIM | {"nonces": nonces, "dist": [1.5, 1.5, *dist[2:]]})
    assert (two["n_invalid"], two["fraud_detected"]) == (2, True)


def test_fault_06_the_threshold_of_the_round_is_used(service):
    service.post("/init/validate", ROUND | {"fraud_threshold": 1e-9})
    assert not service.post("/validate", CLAIM | {"nonces": [0, 1], "dist": [1.5, 1.5]})[
        "fraud_detected"
    ]


def test_fault_07_the_callback_url_survives_phases(service):
    receiver = FlakyReceiver(trouble=0)
    try:
        service.post("/init/generate", ROUND | {"callback_url": receiver.url})
        until(lambda: receiver.nonces())
        service.post("/phase/validate")
        service.post("/phase/generate")
        before = max(receiver.nonces())
        until(lambda: max(receiver.nonces()) > before)
        service.post("/phase/validate")
        service.post("/validate", CLAIM | {"nonces": [0], "dist": [1.4]})
        until(lambda: any(path == "/validated" for path, _, _ in receiver.requests))
    finally:
        service.post("/stop")
        until(lambda: service.controller.outbox.counts()["pending"] == 0)
        receiver.close()


def test_fault_08_without_a_receiver_nothing_piles_up_and_status_stays_small(service):
    service.rig.pause = 0
    service.post("/init/generate", ROUND | {"batch_size": 64})
    until(lambda: service.status()["total_valid"] > 600)
    service.post("/stop")
    assert len(service.status()["valid_nonces"]) == len(service.status()["valid_distances"]) == 256
    assert service.controller.outbox.counts() == {"pending": 0, "dead": 0}
    page = service.client.get(f"{PREFIX}/status", params={"after": -1, "limit": 500}).json()[
        "valid_nonces"
    ]
    rest = service.client.get(
        f"{PREFIX}/status", params={"after": page[-1], "limit": 10_000}
    ).json()["valid_nonces"]
    assert len(page) == 500
    assert len(page + rest) == len(set(page + rest)) == service.status()["total_valid"]


@pytest.mark.slow
def test_fault_11_a_long_batch_blocks_nothing(service):
    service.rig.open.clear()
    service.post("/init/generate", ROUND)
    assert service.rig.entered.wait(10)
    for _ in range(50):
        assert service.client.get("/health").status_code == 200
        assert service.status()["state"] == "GENERATING"
    assert service.rig.batches == 1
    assert service.post("/stop")["pow_status"]["state"] == "STOPPED"
    assert service.checked() == 0


def test_fault_14_what_a_block_needs_is_made_once_per_phase(service, monkeypatch):
    made = []
    real = _outputs.Transform
    monkeypatch.setattr(
        _outputs, "Transform", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs)
    )
    service.post("/init/generate", ROUND)
    until(lambda: service.rig.batches >= 5)
    assert len(made) == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_fault_15_a_distance_that_is_no_number_ends_the_round(service, scale):
    service.rig.scale = scale
    service.post("/init/generate", ROUND)
    until(lambda: service.status()["state"] == "STOPPED")
    assert service.checked() == 0
    assert "NaN" in service.status()["error"]
    assert service.client.get("/ready").status_code == 503
    service.rig.scale = 1.0
    service.post("/phase/generate")
    until(lambda: service.checked() > 0)
    assert service.status()["error"] is None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", "1e999"])
def test_fault_15_a_received_value_that_is_no_number_is_a_mismatch(service, value):
    service.post("/init/validate", ROUND)
    body = f'{{"block_hash":"block_alpha","block_height":7,"public_key":"k","nonces":[0],"dist":[{value}],"node_id":0}}'
    answer = service.client.post(
        f"{PREFIX}/validate", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200
    assert answer.json()["n_invalid"] == 1
    assert answer.json()["residual_test"]["gross"] == 1


def test_fault_16_generation_after_stop_is_the_same_computation(service):
    service.generate(5, {"use_sign_flips": False, "use_layer_hooks": True})
    service.post("/stop")
    before = service.checked()
    service.rig.layers.clear()
    service.post("/phase/generate")
    until(lambda: service.checked() > before)
    assert service.rig.layers == ["normalize_reflect"]
    service.post("/stop")
    rows = service.controller.rounds.recent_valid(
        service.controller.progress.stored.id, limit=10_000
    )
    nonces = [nonce for nonce, _ in rows]
    assert nonces == sorted(set(nonces))


def test_fault_17_everything_has_a_bound(service):
    service.post("/init/validate", ROUND)
    shares = dict.fromkeys(("node_id", "node_count", "n_groups"), 2**53 - 1)
    rounds = (
        *({"batch_size": size} for size in (0, 2000)),
        {"seq_len": 513},
        {"group_id": 3, "n_groups": 3},
        shares,
    )
    claims = (
        ([], [1.4]),
        (list(range(20_000)), [1.4] * 20_000),
        ([2**60], [1.4]),
        ([-1], [1.4]),
        ([1, 1], [1.4] * 2),
    )
    calls = [("/init/generate", ROUND | change, 422) for change in rounds]
    for nonces, dist in (*claims, ([1], []), ([1], ["1.4"])):
        calls.append(("/validate", CLAIM | {"nonces": nonces, "dist": dist}, 422))
    calls.append(
        ("/validate", CLAIM | {"nonces": [1], "dist": [1.4], "public_key": "x" * 2_000_000}, 413)
    )
    calls.append(("/validate", CLAIM | {"nonces": [1], "dist": [1.4], "block_height": 8}, 409))
    for path, body, status in calls:
        answer = service.post(path, body, status=status)
        assert {"detail", "wanted", "do"} <= answer.keys()
        assert len(str(answer)) < 5000


def test_fault_17_validations_that_wait_are_bounded(serving):
    with (
        serving(max_waiting=4) as service,
        ThreadPoolExecutor(6) as pool,
    ):  # of which one client may have two
        service.post("/init/validate", ROUND)
        service.rig.open.clear()
        service.rig.entered.clear()
        claim = CLAIM | {"nonces": [0], "dist": [1.4]}
        sent = [pool.submit(service.client.post, f"{PREFIX}/validate", json=claim)]
        assert service.rig.entered.wait(20)  # it runs, and waits no more
        sent += [
            pool.submit(service.client.post, f"{PREFIX}/validate", json=claim) for _ in range(5)
        ]
        until(lambda: sum(answer.done() for answer in sent) == 3)  # two wait
        refused = [answer.result() for answer in sent if answer.done()]
        assert {answer.status_code for answer in refused} == {429}
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        other = TestClient(service.client.app, client=("192.0.2.7", 1), base_url="http://127.0.0.1")
        sent.append(pool.submit(other.post, f"{PREFIX}/validate", json=claim))
        # A refusal of the first client counts the validation of the other beside its own two.
        waiting = "2 validations of one client are open, of 3 in all"
        until(lambda: service.post("/validate", claim, status=429)["detail"] == waiting)
        service.rig.open.set()
        assert sorted(answer.result().status_code for answer in sent) == [200] * 4 + [429] * 3


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://127.0.0.1:1/",
        "file:///etc/passwd",
        "http://user:pw@8.8.8.8/",
    ],
)
def test_fault_18_callbacks_do_not_reach_into_private_networks(serving, url):
    with serving(allow_private_callbacks=False) as service:
        service.post("/init/generate", ROUND | {"callback_url": url}, status=422)
        service.post("/init/generate", ARTIFACTS | {"url": url}, status=422)
        assert service.status()["state"] == "IDLE"


def test_the_engines_thread_survives_what_it_does_not_expect(serving, monkeypatch):
    real = Jobs.step
    calls = []

    def step(jobs, deployment):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("something else")
        return real(jobs, deployment)

    monkeypatch.setattr(Jobs, "step", step)  # before the service starts: its worker takes it then
    with serving() as service:
        job = ARTIFACTS | {"nonces": [0], "wait": True}
        assert service.post("/generate", job)["status"] == "completed"


def test_a_preset_that_the_engine_does_not_support_is_refused_when_the_round_begins(service):
    service.rig.supports = lambda pipeline: pipeline.layers == "none"
    body = ROUND | {"use_sign_flips": False, "use_layer_hooks": True}
    refused = service.post("/init/generate", body, status=422)
    assert "on the fake engine" in refused["detail"]
    assert service.status()["state"] == "IDLE"
    service.generate(8)
