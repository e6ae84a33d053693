"""The OpenAPI document, and what random requests made from it get back over a real socket."""

import re
import tempfile
from pathlib import Path

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from assay.poc.service import ServiceSettings, create_app
from assay.poc.service.service_controller import Controller
from tests.poc.service.conftest import Rig
from tests.poc.service.listening import listening

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a service on a fake engine, with every route that a client may call."""
    rig = Rig()
    rig.pause = 0
    settings = ServiceSettings(
        data_dir=tmp_path_factory.mktemp("openapi"), seq_len=4, wait=0.05, max_positions=4096
    )
    controller = Controller(rig.deployment, settings)
    with listening(controller) as port:
        yield f"http://127.0.0.1:{port}"


def operations() -> list[schemathesis.APIOperation]:
    """Every operation of the document but the stream of events, which has no end."""
    with tempfile.TemporaryDirectory() as directory:
        controller = Controller(Rig().deployment, ServiceSettings(data_dir=Path(directory)))
        app = create_app(controller)
        controller.close()
    schema = schemathesis.openapi.from_dict(app.openapi()).exclude(path_regex="/events$")
    return [found.ok() for found in schema.get_all_operations()]


def cases() -> list[object]:
    """Valid requests for every operation, and invalid ones where a request can be invalid at
    all.
    """
    modes = schemathesis.GenerationMode
    return [
        pytest.param(operation, mode, id=f"{operation.label}-{mode.value}")
        for operation in operations()
        for mode in (modes.POSITIVE, modes.NEGATIVE)
        if mode is modes.POSITIVE or operation.body or operation.query
    ]


@pytest.mark.parametrize(("operation", "mode"), cases())
def test_no_request_is_answered_with_a_server_error(operation, mode, address):
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def answers(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=address, checks=CHECKS)

    answers()


def test_the_page_of_the_docs_needs_nothing_from_elsewhere(address):
    page = httpx.get(f"{address}/docs")
    assert page.status_code == 200
    assert not re.findall(r"(?:src|href)=[\"'](?!openapi\.json)", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "openapi.json" in page.text
