"""The calls of the Gonka chain's client, as that chain's own servers answer them.

That client calls a machine by itself, or through MLNode, which stands before several servers.
Rounds and jobs are those of the published API. What differs is what the client relies on: a stopped
service is IDLE and has no round, ``stop`` ends all jobs, a restart begins no round, and a node may
be given another share of the same block. docs/gonka.md lists where answers still differ.
"""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from assay.files.jsonl import JsonObject
from assay.poc.net.keys import Scope
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import problems
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.service import reply_bodies as replies
from assay.poc.service import request_bodies as requests
from assay.poc.service.service_controller import Controller
from assay.poc.service.states import State

CHAIN_PREFIX = "/api/v1/inference/pow"
"""Path that the client calls: that of MLNode, whose servers have the published path."""

CONFIG = (
    "block_hash",
    "block_height",
    "public_key",
    "node_id",
    "node_count",
    "group_id",
    "n_groups",
    "seq_len",
)
"""What a status says of the round."""


def describe_config(controller: Controller) -> JsonObject | None:
    """Return the round as a status has it, None before the first."""
    if (progress := controller.progress) is None:
        return None
    stored = progress.stored
    size = get_pipeline(stored.preset).vector_size
    return {name: getattr(stored, name) for name in CONFIG} | {"k_dim": size}


def describe_server(controller: Controller) -> JsonObject:
    """Return what a server of the chain says of itself: IDLE and nothing else unless it
    generates.
    """
    progress = controller.progress
    failed = {} if controller.error is None else {"error": controller.error}
    if controller.state is not State.GENERATING or progress is None:
        return {"status": "IDLE", "config": None, "stats": None, **failed}
    stats = {"total_processed": progress.checked, "nonces_per_second": progress.rate}
    return {"status": "GENERATING", "config": describe_config(controller), "stats": stats, **failed}


def _port(request: Request) -> int | None:
    """Return the port on which a request came; None where the server listens on a file."""
    server = request.scope.get("server")
    return server[1] if server else None


def chain_router(
    controller: Controller, kind_of_route: type[APIRoute], *, prefix: str = CHAIN_PREFIX
) -> APIRouter:
    """Return the routes of the chain's client, with the fields of MLNode or of its servers."""
    router = APIRouter(prefix=prefix, tags=["Gonka"], route_class=kind_of_route)
    as_node = prefix == CHAIN_PREFIX
    works = problems(400, 409, 413, 422, 429, 503)
    shown: dict[str, Any] = {"response_model": replies.ChainReply, "include_in_schema": as_node}
    changes = shown | {"openapi_extra": Scope.CONTROL.extra, "responses": works}
    checks = shown | {"openapi_extra": Scope.VALIDATE.extra}

    def done(request: Request, state: str, word: str, about: JsonObject) -> Response:
        if not as_node:
            return JSONResponse({"status": "OK", "pow_status": {"status": state}})
        result = {"port": _port(request), "status": word}
        return JSONResponse({"status": "OK", **about, "results": [result], "errors": None})

    @router.post("/init/generate", **changes)
    def init_generate(body: requests.ChainInit, request: Request) -> Response:
        """Begin a round of vectors, or go on with it."""
        controller.init(body, "init/generate")
        return done(request, "GENERATING", "OK", {"backends": 1, "n_groups": body.n_groups})

    @router.post("/stop", **changes)
    def stop(request: Request) -> Response:
        """Stop generating, and cancel all jobs. Callbacks that are owed are still delivered."""
        controller.stop(cancel_jobs=True)
        return done(request, "STOPPED", "stopped", {})

    @router.get("/status", **shown, responses=problems(), openapi_extra=Scope.READ.extra)
    async def status(request: Request) -> Response:
        """Return whether a round generates, and which."""
        server = describe_server(controller)
        if not as_node:
            return JSONResponse(server)
        if controller.deployment is None:
            return JSONResponse({"status": "NO_BACKENDS", "backends": []})
        servers = [{"port": _port(request), **server}]
        return JSONResponse({"status": server["status"], "backends": servers})

    @router.post("/generate", **checks, responses=works)
    async def generate(body: requests.ChainJob, request: Request) -> Response:
        """Queue a job for vectors; with ``wait`` answer with its result, or 503 without one."""
        # Where the operator says so, all that comes is of one client, which has the whole queue.
        alone = controller.settings.compatibility == "gonka"
        state, _ = await controller.run_job(body, None if alone else request.state.client)
        # The client takes every status below 400 for a result.
        if body.wait and state["status"] != "completed":
            raise Refusal(
                503,
                f"job {state['request_id']} is {state['status']}: {state.get('error', 'no end')}",
                wanted=f"its result in {controller.settings.wait:g} s",
                do="ask for its result under /generate, or do not wait",
                retry_after=10,
            )
        counted = {} if body.wait else {"queued_count": len(body.nonces)}
        return JSONResponse(state | counted)

    @router.get("/generate/{request_id}", **checks, responses=problems(404, 422))
    def job(request_id: str) -> Response:
        """Return the state of a job."""
        return JSONResponse(controller.jobs.state(request_id))

    return router
