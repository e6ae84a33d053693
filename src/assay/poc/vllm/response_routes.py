"""Receipts of what a vLLM server answers: the block that seeds an answer, the client's part of the seed, the routes.

Clients stay as they are. A request may name itself by ``X-Request-Id`` and bring a seed, in the field ``seed`` of its
body or in ``X-Assay-User-Seed``; the answer's ``X-Assay-Receipt`` has the id of its receipt, and ``X-Assay-Block`` the
block. Until the node's chain follower has posted a block, answers are neither seeded nor recorded and say so.
"""

import asyncio
import secrets
from collections.abc import Awaitable
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from assay.errors import AssayError
from assay.models.load import identify
from assay.poc.net.refusals import refusal_of
from assay.poc.net.routes import Keys, Scope, answer, needs, route_class, route_path
from assay.poc.protocol.round import check_name
from assay.poc.responses.receipts import ReceiptHeader
from assay.poc.service.app import PREFIX, PREFIXES
from assay.poc.service.controller import Controller
from assay.poc.service.receipts import ReceiptKeeper
from assay.poc.vllm.client import Client, call_workers
from assay.poc.vllm.compatibility import refuse_missing
from assay.poc.vllm.engine import fingerprint_of
from assay.poc.vllm.preflight import PluginSettings
from assay.poc.vllm.recorder import ACCEPTED, Accepted, Beacon, ReceiptSink, Recorder

WITHOUT_ENGINE = frozenset({"/tokenize", "/detokenize"})
"""POST routes that need no engine."""

RECEIPT, BLOCK, REQUEST_ID, USER_SEED = b"x-assay-receipt", b"x-assay-block", b"x-request-id", b"x-assay-user-seed"
NO_RECEIPT = [(RECEIPT, b"none")]


class Responses:
    """What is done for the answers of one server. It belongs to the event loop of the application."""

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings
        self.beacon = Beacon()
        self.recorder: Recorder | None = None
        self.sink: ReceiptSink | None = None

    async def start(
        self, client: Client, llm: Any, *, model: str, reference: str, version: str, receipts: ReceiptKeeper
    ) -> None:
        """Begin to record, once the engine runs.

        Args:
            client: Client of the engine that has described its workers.
            llm: Engine client of vLLM.
            model: Directory or hub id of the checkpoint, which is hashed.
            reference: Name of the model in the receipts.
            version: Version of vLLM.
            receipts: Store of the receipts.

        Raises:
            BackendUnavailable: The workers lack a name that is used.
            ModelError: The checkpoint cannot be read.
        """
        problems = await call_workers(llm, "assay_sketch")
        refuse_missing("workers of vLLM", sorted({name for found in problems for name in found}))
        worker, config = client.description, llm.vllm_config
        known = await asyncio.to_thread(identify, model, dtype=worker["dtype"])
        sizes = {"batch_size": config.scheduler_config.max_num_seqs, "seq_len": config.model_config.max_model_len}
        header = ReceiptHeader(
            public_key=self.settings.responses_public_key,
            reference=reference,
            digest=known.digest,
            weights=known.weights,
            fingerprint=fingerprint_of(worker, version, **sizes),
        )
        self.sink = receipts.sink(header)
        self.recorder = Recorder(
            llm,
            self.sink,
            public_key=header.public_key,
            digest=header.digest,
            seeded=self.settings.responses == "seeded",
        )

    async def accept(self, headers: dict[bytes, bytes]) -> Accepted | None:
        """Fix what seeds the answer to a request; None where it is neither seeded nor recorded.

        Raises:
            AssayError: A header cannot be part of a seed, or no receipt could be stored now.
        """
        if self.sink is None:
            return None
        named, seed = headers.get(REQUEST_ID), headers.get(USER_SEED)
        request_id = named.decode("latin-1") if named is not None else secrets.token_hex(16)
        check_name("X-Request-Id", request_id, do="send such an id, or none")
        user_seed = None if seed is None else seed.decode("latin-1")
        if user_seed is not None:
            check_name("X-Assay-User-Seed", user_seed, do="send such a seed, or none", fewest=0)
        self.sink.check()
        later = self.settings.responses_block == "next"
        block = await self.beacon.next(self.settings.responses_wait) if later else self.beacon.newest
        if block is None:
            return None
        return Accepted(request_id, block, user_seed, "server" if named is None else "client")

    def describe(self) -> dict[str, Any]:
        """Return the settings, the block that is known, and how many receipts there were."""
        return {
            "mode": self.settings.responses,
            "public_key": self.settings.responses_public_key,
            "block": self.settings.responses_block,
            "block_hash": self.beacon.newest,
            "receipts": {} if self.recorder is None else self.recorder.counts,
        }


class ReceiptMiddleware:
    """Puts requests for the engine into the context in which it is seeded, and names the receipt in the answer.

    An answer whose receipt cannot be stored does not reach its end: it is replaced by the refusal where nothing was
    sent, and else cut off.
    """

    def __init__(self, app: ASGIApp, *, responses: Responses) -> None:
        self._app, self._responses = app, responses

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        path = route_path(scope) if scope["type"] == "http" and scope["method"] == "POST" else ""
        if not path or path in WITHOUT_ENGINE or path.startswith(PREFIXES):
            await self._app(scope, receive, send)
            return
        try:
            accepted = await self._responses.accept(dict(scope["headers"]))
        except AssayError as error:
            await answer(refusal_of(error))(scope, receive, send)
            return
        if accepted is None:
            await self._app(scope, receive, _unrecorded(send))
            return
        if accepted.chosen_by == "server":  # vLLM makes the id of its answer from it
            scope = dict(scope) | {"headers": [*scope["headers"], (REQUEST_ID, accepted.request_id.encode())]}
        token, guarded = ACCEPTED.set(accepted), _Guarded(scope, receive, send, accepted)
        try:
            await self._app(scope, receive, guarded)
        except _CutOff:
            pass
        except Exception:
            if accepted.refused is None:
                raise
            await guarded.refuse()
        finally:
            ACCEPTED.reset(token)


class _CutOff(Exception):
    """An answer that must not reach its end."""


class _Guarded:
    """The ``send`` of an answer that is recorded."""

    def __init__(self, scope: Connection, receive: Receive, send: Send, accepted: Accepted) -> None:
        self._scope, self._receive, self._accepted, self._plain = scope, receive, accepted, send
        self._started = self._refused = False

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message of the answer, or the refusal in place of all of them."""
        if self._accepted.refused is not None:
            return self.refuse()
        if not self._started:
            self._started = True
            message = _with(message, self._headers(message))
        return self._plain(message)  # not awaited here: a stream has a message for every token

    def _headers(self, message: Message) -> list[tuple[bytes, bytes]]:
        """Return the names of receipt and block; a stream begins before its request is known to be recorded."""
        streams = any(name == b"content-type" and b"event-stream" in value for name, value in message["headers"])
        if not streams and not self._accepted.stored:
            return NO_RECEIPT
        named = {RECEIPT: self._accepted.request_id, BLOCK: self._accepted.block_hash}
        return [(name, quote(text).encode()) for name, text in named.items()]

    async def refuse(self) -> None:
        """Send the refusal; cut an answer off that has begun."""
        if self._started:
            raise _CutOff
        if self._accepted.refused is not None and not self._refused:
            self._refused = True
            await answer(refusal_of(self._accepted.refused))(self._scope, self._receive, self._plain)


def _with(message: Message, headers: list[tuple[bytes, bytes]]) -> Message:
    return dict(message) | {"headers": [*message.get("headers", ()), *headers]}


def _unrecorded(send: Send) -> Send:
    """Return a ``send`` that says that there is no receipt."""

    async def wrapped(message: Message) -> None:
        await send(_with(message, NO_RECEIPT) if message["type"] == "http.response.start" else message)

    return wrapped


class NewBlock(BaseModel):
    """A block that the chain has."""

    model_config = ConfigDict(extra="forbid", strict=True)

    block_hash: str


def responses_router(controller: Controller, responses: Responses) -> APIRouter:
    """Return ``/api/v1/pow/responses``: what is done for answers, and the block that seeds those to come.

    Reading takes a key that may read, posting a block one that may do everything.
    """
    router = APIRouter(
        prefix=PREFIX,
        tags=["vLLM"],
        route_class=route_class(Keys(controller.settings), controller.settings, controller.metrics),
    )

    @router.get("/responses", openapi_extra=needs(Scope.READ))
    async def now() -> JSONResponse:
        """Whether answers are seeded and recorded, by which block, and how many were."""
        return JSONResponse(responses.describe())

    @router.post("/responses/block", openapi_extra=needs(Scope.CONTROL))
    async def post(body: NewBlock) -> JSONResponse:
        """Take the newest block of the chain: the answers to later requests follow from it."""
        check_name("block_hash", body.block_hash, do="pass the block hash as the chain prints it")
        responses.beacon.post(body.block_hash)
        return JSONResponse(responses.describe())

    return router
