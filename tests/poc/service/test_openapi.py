"""The OpenAPI document, and what random requests made from it get back over a real socket."""

import re
import tempfile
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from assay.poc.service import ServiceSettings, create_app
from assay.poc.service.service_controller import Controller
from tests.poc.service.conftest import Rig
from tests.poc.service.listening import listening
from tests.usual import examples

EVENTS = "/events"  # the end of the path of the stream, which has no end


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


@pytest.fixture(scope="module")
def schema(address):
    """The document as schemathesis reads it.

    It takes seconds to import, which no process should spend that only collects the tests.
    """
    import schemathesis

    return schemathesis.openapi.from_dict(httpx.get(f"{address}/openapi.json").json())


def cases() -> list[Any]:
    """Valid requests for every operation, and invalid ones where a request can be invalid at
    all.
    """
    with tempfile.TemporaryDirectory() as directory:
        controller = Controller(Rig().deployment, ServiceSettings(data_dir=Path(directory)))
        paths = create_app(controller).openapi()["paths"]
        controller.close()
    return [
        pytest.param(path, method, mode, id=f"{method.upper()} {path}-{mode}")
        for path, methods in paths.items()
        for method, operation in methods.items()
        for mode in ("positive", "negative")
        if mode == "positive" or takes_more_than_its_path(operation)
        if not path.endswith(EVENTS)
    ]


def takes_more_than_its_path(operation: dict[str, Any]) -> bool:
    parameters = operation.get("parameters", [])
    return "requestBody" in operation or any(one["in"] == "query" for one in parameters)


@pytest.mark.parametrize(("path", "method", "mode"), cases())
def test_no_request_is_answered_with_a_server_error(path, method, mode, schema, address):
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    requests = schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @hypothesis.given(case=requests)
    @hypothesis.settings(
        max_examples=examples(30),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def answers(case: Any) -> None:
        case.call_and_validate(base_url=address, checks=checks)

    answers()


def test_the_page_of_the_docs_needs_nothing_from_elsewhere(address):
    page = httpx.get(f"{address}/docs")
    assert page.status_code == 200
    assert not re.findall(r"(?:src|href)=[\"'](?!openapi\.json)", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "openapi.json" in page.text
