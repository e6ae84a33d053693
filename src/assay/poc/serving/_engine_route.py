"""``/api/v1/pow/engine``: what nonces take of the vLLM engine now, and what they may take."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import APIRouter

    from assay.poc.engines.vllm import Client
    from assay.poc.service.runtime import Controller

__all__ = ["change_throttle", "engine_router", "engine_status"]


async def engine_status(client: "Client", version: str) -> dict[str, Any]:
    """Return settings and state of the throttle, and what every worker holds."""
    throttle = client.throttle
    throttle.look()
    return {
        "vllm": version,
        "worker": client.description,
        "mode": throttle.settings.mode,
        "share": throttle.settings.share,
        "chat_in_flight": throttle.settings.chat_in_flight,
        "nonces": throttle.in_flight,
        "nonces_limit": throttle.limit,
        "chat": throttle.chat,
        "workers": await client.counts(),
    }


def change_throttle(client: "Client", changes: dict[str, Any]) -> None:
    """Change settings of the throttle until the server ends.

    Raises:
        UsageError: A value is out of range.
    """
    client.throttle.settings = replace(client.throttle.settings, **changes)


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
        return JSONResponse(await engine_status(*client()))

    async def change(body: Changes) -> JSONResponse:
        change_throttle(client()[0], body.model_dump(exclude_none=True))
        return await now()

    kind = route_class(controller, Keys(controller.settings))
    router = APIRouter(prefix=PREFIX, tags=["vLLM"], route_class=kind)
    about = "Nonces and chat in the vLLM engine, the settings of the throttle, and what the workers hold."
    router.add_api_route("/engine", now, methods=["GET"], description=about, openapi_extra=needs(Scope.READ))
    allow = "Change mode, share or chat_in_flight until the server ends."
    router.add_api_route("/engine", change, methods=["POST"], description=allow, openapi_extra=needs(Scope.CONTROL))
    return router
