"""The published routes under ``/api/v1/pow``, and those that operators expect."""

import asyncio
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from assay.poc.service._bodies import AnyInit, GenerateRequest, InitRequest, ValidateRequest
from assay.poc.service._refusals import Refusal
from assay.poc.service._states import State
from assay.poc.service.http._auth import Keys, Scope
from assay.poc.service.http._feed import Feed
from assay.poc.service.http._guarded_route import needs, route_class
from assay.poc.service.http._replies import Health, InitReply, JobReply, Problem, Ready, Status, ValidateReply
from assay.poc.service.http._status import status as current_status
from assay.poc.service.http._status import status_after
from assay.poc.service.runtime import CONTENT_TYPE, Controller

__all__ = ["PREFIX", "operations_router", "pow_router"]

PREFIX = "/api/v1/pow"
READ, VALIDATE, CONTROL = needs(Scope.READ), needs(Scope.VALIDATE), needs(Scope.CONTROL)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (401, 403, *statuses)}


def pow_router(controller: Controller, keys: Keys, feed: Feed) -> APIRouter:
    """Return the routes of the published API."""
    router = APIRouter(prefix=PREFIX, tags=["PoC"], route_class=route_class(controller, keys))
    changes = _problems(400, 409, 413, 422, 503)

    def moved() -> Response:
        return JSONResponse({"status": "OK", "pow_status": current_status(controller)})

    @router.post("/init", response_model=InitReply, responses=changes, openapi_extra=CONTROL)
    def init(body: InitRequest) -> Response:
        """Begin a round, and stay idle."""
        controller.init(body, State.IDLE)
        return moved()

    @router.post("/init/generate", response_model=InitReply, responses=changes, openapi_extra=CONTROL)
    def init_generate(body: AnyInit) -> Response:
        """Begin a round and generate: distances with ``r_target``, vectors with ``params``."""
        controller.init(body, State.GENERATING)
        return moved()

    @router.post("/init/validate", response_model=InitReply, responses=changes, openapi_extra=CONTROL)
    def init_validate(body: InitRequest) -> Response:
        """Begin a round and accept validations of its block."""
        controller.init(body, State.VALIDATING)
        return moved()

    @router.post("/phase/generate", response_model=InitReply, responses=changes, openapi_extra=CONTROL)
    def phase_generate() -> Response:
        """Generate; the round continues at its next nonce."""
        controller.phase("phase/generate")
        return moved()

    @router.post("/phase/validate", response_model=InitReply, responses=changes, openapi_extra=CONTROL)
    def phase_validate() -> Response:
        """Stop generating and accept validations."""
        controller.phase("phase/validate")
        return moved()

    @router.post(
        "/validate",
        response_model=ValidateReply,
        responses=_problems(400, 409, 413, 422, 429, 503),
        openapi_extra=VALIDATE,
    )
    async def validate(body: ValidateRequest) -> Response:
        """Recompute distances and judge them."""
        future = await controller.call(controller.validate, body)
        return JSONResponse(await asyncio.wrap_future(future))

    @router.get("/status", response_model=Status, responses=_problems(422), openapi_extra=READ)
    async def status(
        after: Annotated[int | None, Query(ge=-1, le=2**53 - 1)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> Response:
        """Return state and counts. With ``after``, the first ``limit`` valid nonces above it, for clients that pull."""
        if after is None:
            return Response(feed.status(), media_type="application/json")
        return JSONResponse(await controller.call(status_after, controller, after, limit))

    @router.post("/stop", response_model=InitReply, responses=_problems(503), openapi_extra=CONTROL)
    def stop() -> Response:
        """Stop generating and validating. Callbacks that are owed are still delivered."""
        controller.stop()
        return moved()

    @router.post(
        "/generate",
        response_model=JobReply,
        responses=_problems(400, 409, 413, 422, 429, 503) | {202: {"model": JobReply}},
        openapi_extra=VALIDATE,
    )
    async def generate(body: GenerateRequest) -> Response:
        """Queue an artifact job. With ``wait``, answer with its result, or 202 where that takes too long."""
        queued = await controller.call(controller.submit, body)
        if not body.wait:
            return JSONResponse(queued)
        return await _wait_for_job(controller, queued)

    @router.get(
        "/generate/{request_id}", response_model=JobReply, responses=_problems(404, 422), openapi_extra=VALIDATE
    )
    def job(request_id: str) -> Response:
        """Return the state of an artifact job."""
        return JSONResponse(controller.jobs.state(request_id))

    @router.delete(
        "/generate/{request_id}", response_model=JobReply, responses=_problems(404, 422, 503), openapi_extra=VALIDATE
    )
    def cancel(request_id: str) -> Response:
        """Cancel an artifact job that is not finished."""
        return JSONResponse(controller.jobs.cancel(request_id))

    @router.get("/events", responses=_problems(429), response_class=StreamingResponse, openapi_extra=READ)
    async def events(request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(feed.stream(), media_type="text/event-stream", headers=headers)

    @router.get("/snapshot", responses=_problems(), openapi_extra=READ)
    async def snapshot() -> Response:
        """Return the latest snapshot, the same object as an event."""
        return Response(feed.latest(), media_type="application/json")

    return router


async def _wait_for_job(controller: Controller, queued: dict[str, Any]) -> Response:
    job_id = queued["request_id"]
    future = await controller.call(controller.jobs.watch, job_id)
    try:
        async with asyncio.timeout(controller.settings.wait):
            return JSONResponse(await asyncio.wrap_future(future))
    except TimeoutError:
        return JSONResponse(await controller.call(controller.jobs.state, job_id), status_code=202)
    finally:
        controller.jobs.forget(job_id, future)


def operations_router(controller: Controller, keys: Keys, feed: Feed) -> APIRouter:
    """Return ``/health``, ``/ready`` and ``/metrics``."""
    router = APIRouter(tags=["operations"], route_class=route_class(controller, keys))

    @router.get("/health", response_model=Health)
    async def health() -> Response:
        """Answer: the process lives."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=Ready, responses={503: {"model": Problem}})
    async def ready() -> Response:
        """Answer 200 once the model is loaded and nothing has failed."""
        controller.ready()
        if controller.error is not None:
            raise Refusal(503, controller.error, wanted="no failure", do="see the log, then start the phase again")
        return JSONResponse({"ready": True})

    @router.get("/metrics", responses=_problems(), openapi_extra=READ)
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        controller.metrics.show(json.loads(feed.latest()))
        return Response(controller.metrics.text(), media_type=CONTENT_TYPE)

    return router
