"""The service with a ledger: what it judges enters the lives of nodes, and its replies stay as they
are.
"""

import pytest

from assay.errors import UsageError
from assay.poc.protocol.pins_file import Accepted
from assay.poc.service import ServiceSettings
from assay.poc.service.service_controller import Controller
from assay.poc.verdict import Account, Ledger, audit_ledger
from tests.poc.service.conftest import BLOCK, FULL, PREFIX, ROUND, failing
from tests.poc.service.test_judge import CLAIM, ask, truth
from tests.poc.service.test_pins import pins
from tests.wordings import refuses


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


def life(path, service, key: str = "node_A"):
    deployment = service.rig.deployment()
    with Ledger(path, read_only=True) as ledger:
        account = Account(
            public_key=key, digest=deployment.digest, build=deployment.dtype, preset="poc-2.0"
        )
        return ledger.standing(account)


def test_validations_of_many_rounds_are_one_life(serving, path):
    with serving(ledger=path) as service:
        for block in ("one", "other"):
            service.post("/init/validate", ROUND | {"block_hash": block})
            right = truth(service, 20)
            claim = CLAIM | {"block_hash": block, "nonces": list(range(20)), "dist": right}
            service.post("/validate", claim)
        standing = life(path, service)
        assert (standing.verdict, standing.audits, standing.evidence.n) == ("honest", 2, 40)
    assert audit_ledger(path).clean


def test_a_ledger_has_the_alpha_of_the_network(serving, path):
    network = pins().model_copy(update={"network": Accepted(nodes=100, false_convictions=1)})
    with serving(ledger=path, pins=network):
        assert Ledger(path, read_only=True).genesis.alpha == 0.01


def test_asking_twice_proves_nothing_over_a_life_either(serving, path):
    with serving(ledger=path) as service:
        service.post("/init/validate", ROUND)
        right = truth(service, 12)
        for _ in range(3):
            ask(service, list(range(12)), right)
        service.restart()
        ask(service, list(range(6, 12)), right[6:])
        standing = life(path, service)
    assert (standing.audits, standing.recorded, standing.evidence.n) == (4, 42, 12)


def test_a_reply_is_the_same_with_a_ledger(serving, path, tmp_path):
    replies = []
    for place in (None, path):
        with serving(ledger=place, data_dir=tmp_path / f"data of {place is None}") as service:
            service.post("/init/validate", ROUND)
            wrong = [d + 0.002 for d in truth(service, 12)]
            replies.append(
                service.post("/validate", CLAIM | {"nonces": list(range(12)), "dist": wrong})
            )
            service.post("/validate", CLAIM | {"nonces": [], "dist": []})
    assert replies[0] == replies[1]
    assert life(path, service).evidence.log_e_max > 10


def test_a_ledger_that_cannot_be_written_is_an_answer_that_can_be_repeated(
    serving, path, monkeypatch
):
    with serving(ledger=path) as service:
        service.post("/init/validate", ROUND)
        right = truth(service, 20)
        full = failing(monkeypatch, Ledger, "append", FULL)
        body = BLOCK | {"node_id": 0, "nonces": list(range(20)), "dist": right}
        assert service.client.post(f"{PREFIX}/validate", json=body).status_code >= 500
        full.clear()
        reply = service.post("/validate", body)["residual_test"]
        assert (reply["verdict"], reply["checked"]) == ("honest", 20)
        assert life(path, service).evidence.n == 20


def test_a_ledger_of_other_error_rates_is_refused_at_the_start(rig, tmp_path, path):
    Ledger(path, alpha=1e-6).close()
    with refuses(UsageError, "a ledger of other error rates is refused at the start"):
        Controller(rig.deployment, ServiceSettings(data_dir=tmp_path / "data", ledger=path))
