"""``/api/v1/pow/engine``: what nonces take of the vLLM engine now, and what they may take."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import APIRouter

    from assay.poc.engines.vllm import Client
    from assay.poc.service.runtime import Controller


def engine_router(controller: "Controller", client: Callable[[], tuple["Client", str]]) -> "APIRouter":
    """Return the routes; reading takes a key that may read, changing one that may do everything."""
    from fastapi import APIRouter
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict

    from assay.poc.service.http import PREFIX, Keys, Scope, needs, route_class

    class Changes(BaseModel):
        """Settings of the throttle; those that are left out stay."""

        model_config = ConfigDict(extra="forbid", strict=True)

        mode: str | None = None
        share: float | None = None
        chat_in_flight: int | None = None

    async def now() -> JSONResponse:
        engine, version = client()
        throttle = engine.throttle
        throttle.look()
        return JSONResponse(
            {
                "vllm": version,
                "worker": engine.description,
                "mode": throttle.settings.mode,
                "share": throttle.settings.share,
                "chat_in_flight": throttle.settings.chat_in_flight,
                "nonces": throttle.in_flight,
                "nonces_limit": throttle.limit,
                "chat": throttle.chat,
                "workers": await engine.counts(),
            }
        )

    async def change(body: Changes) -> JSONResponse:
        throttle = client()[0].throttle
        throttle.settings = replace(throttle.settings, **body.model_dump(exclude_none=True))
        return await now()

    kind = route_class(controller, Keys(controller.settings))
    router = APIRouter(prefix=PREFIX, tags=["vLLM"], route_class=kind)
    about = "Nonces and chat in the vLLM engine, the settings of the throttle, and what the workers hold."
    router.add_api_route("/engine", now, methods=["GET"], description=about, openapi_extra=needs(Scope.READ))
    allow = "Change mode, share or chat_in_flight until the server ends."
    router.add_api_route("/engine", change, methods=["POST"], description=allow, openapi_extra=needs(Scope.CONTROL))
    return router
