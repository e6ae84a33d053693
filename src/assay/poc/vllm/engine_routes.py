"""Routes that only a vLLM server has: what nonces take of its engine, receipts, and versions."""

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from assay._version import __version__
from assay.poc.net.keys import Keys, Scope
from assay.poc.net.routes import route_class
from assay.poc.protocol.checks import check_name
from assay.poc.service.chain_api import CHAIN_PREFIX
from assay.poc.service.service_api import PREFIX
from assay.poc.service.service_controller import Controller
from assay.poc.vllm.client import Client
from assay.poc.vllm.recorded_answers import Responses
from assay.poc.vllm.throttle import OperatorsThrottle


class NewBlock(BaseModel, extra="forbid", strict=True):
    """A block that the chain has."""

    block_hash: str


class Changes(BaseModel, extra="forbid", strict=True):
    """Settings of the throttle; those that are left out stay."""

    mode: str | None = None
    share: float | None = None
    chat_in_flight: int | None = None
    path: str | None = None


def engine_router(
    controller: Controller, running: Callable[[], Client], responses: Responses | None
) -> APIRouter:
    """Return the routes of vLLM: what nonces take and may take of the engine, and what is done for
    answers.

    Reading takes a key that may read, changing and posting a block one that may do everything.
    """
    guarded = route_class(Keys(controller.settings), controller.settings, controller.metrics)
    router = APIRouter(prefix=PREFIX, tags=["vLLM"], route_class=guarded)

    @router.get("/engine", openapi_extra=Scope.READ.extra)
    async def now() -> JSONResponse:
        """Nonces and chat in the vLLM engine, the settings of the throttle, and what the workers
        hold.
        """
        # There is one: routes are served after init_state.
        engine = running()
        throttle = engine.throttle
        throttle.look()
        return JSONResponse(
            {
                "vllm": engine.version,
                "worker": engine.description,
                **throttle.settings.model_dump(include=set(Changes.model_fields)),
                "forward": "vllm",  # before 0.3 there was another one
                "direct": engine.direct.describe(),
                "nonces": throttle.in_flight + engine.direct.in_flight,
                "nonces_limit": throttle.limit,
                "chat": throttle.chat,
                "workers": await engine.counts(),
            }
        )

    @router.post("/engine", openapi_extra=Scope.CONTROL.extra)
    async def change(body: Changes) -> JSONResponse:
        """Change mode, share, chat_in_flight or path until the server ends."""
        throttle = running().throttle
        changed = throttle.settings.model_dump() | body.model_dump(exclude_none=True)
        throttle.settings = OperatorsThrottle(**changed)
        return await now()

    if responses is None:
        return router

    @router.get("/responses", openapi_extra=Scope.READ.extra)
    async def recorded() -> JSONResponse:
        """Whether answers are seeded and recorded, by which block, and how many were."""
        return JSONResponse(responses.describe())

    @router.post("/responses/block", openapi_extra=Scope.CONTROL.extra)
    async def post(body: NewBlock) -> JSONResponse:
        """Take the newest block of the chain: the answers to later requests follow from it."""
        check_name("block_hash", body.block_hash, do="pass the block hash as the chain prints it")
        responses.post(body.block_hash)
        return JSONResponse(responses.describe())

    return router


def versions_router(controller: Controller, running: Callable[[], Client]) -> APIRouter:
    """Return the route that tells the client of the chain what this build can do."""
    guarded = route_class(Keys(controller.settings), controller.settings, controller.metrics)
    router = APIRouter(tags=["Gonka"], route_class=guarded)

    async def versions() -> JSONResponse:
        """Version of vLLM, and whether chat goes on while artifacts are checked."""
        about = {"vllm_version": running().version, "poc_validation_inference": True}
        return JSONResponse(about | {"assay_version": __version__})

    for prefix in (CHAIN_PREFIX, PREFIX):
        router.get(f"{prefix}/versions", openapi_extra=Scope.READ.extra)(versions)
    return router
