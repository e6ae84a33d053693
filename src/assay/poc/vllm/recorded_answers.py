"""Answers that leave receipts: their seeds, and the headers that name block and receipt.

Clients stay as they are. A request may name itself by ``X-Request-Id`` and bring a seed, in the
field ``seed`` of its body or in ``X-Assay-User-Seed``; the answer's ``X-Assay-Receipt`` has the id
of its receipt, and ``X-Assay-Block`` the block. Until the node's chain follower has posted a block,
answers are neither seeded nor recorded and say so.
"""

import asyncio
import secrets
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from assay.errors import AssayError
from assay.models.load import identify
from assay.poc.net.answers import answer
from assay.poc.net.local_only import route_path
from assay.poc.net.refusals import refusal_of
from assay.poc.net.shares import client_of
from assay.poc.protocol.checks import check_name
from assay.poc.responses.receipts import ReceiptHeader
from assay.poc.service.receipt_keeper import ReceiptKeeper
from assay.poc.vllm.chat_barrier import asks_engine
from assay.poc.vllm.client import Client, call_workers
from assay.poc.vllm.preflight import PluginSettings
from assay.poc.vllm.recorder import ACCEPTED, AcceptedRequest, Recorder

RECEIPT = b"x-assay-receipt"
BLOCK = b"x-assay-block"
REQUEST_ID = "x-request-id"
USER_SEED = "x-assay-user-seed"
NO_RECEIPT = [(RECEIPT, b"none")]


class Responses:
    """What is done for the answers of one server. It belongs to the event loop of the
    application.
    """

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings
        # Hash of the block that was posted last.
        self.newest: str | None = None
        self.recorder: Recorder | None = None
        # SHA-256 of the one that the server renders with, if it is known.
        self.chat_template: str | None = None
        self._posted = asyncio.Event()

    def post(self, block_hash: str) -> None:
        """Take a block. The same one again is no news."""
        if block_hash != self.newest:
            self.newest = block_hash
            self._posted.set()
            self._posted = asyncio.Event()

    async def next_block(self, seconds: float) -> str | None:
        """Wait for a block that is posted from now on; return None if no block comes in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._posted.wait()
                return self.newest
        return None

    async def start(
        self, client: Client, llm: Any, model: str, reference: str, receipts: ReceiptKeeper
    ) -> None:
        """Begin to record answers of a checkpoint under the name ``reference``.

        Raises:
            ModelError: The checkpoint cannot be read.
        """
        await call_workers(llm, "assay_sketch")
        config = llm.vllm_config
        checkpoint = await asyncio.to_thread(identify, model, dtype=client.description["dtype"])
        header = ReceiptHeader(
            public_key=self.settings.responses_public_key,
            reference=reference,
            digest=checkpoint.digest,
            weights=checkpoint.weights,
            fingerprint=client.fingerprint(
                config.scheduler_config.max_num_seqs, config.model_config.max_model_len
            ),
        )
        self.recorder = Recorder(
            llm,
            receipts.sink(header),
            header=header,
            seeded=self.settings.responses == "seeded",
        )

    async def accept(
        self, headers: Headers, path: str, client: str | None
    ) -> AcceptedRequest | None:
        """Fix the seed of a request's answer; None where it is not recorded.

        Of a header that comes twice the first one counts, as it does for vLLM.
        """
        if self.recorder is None:
            return None
        request_id = headers.get(REQUEST_ID, secrets.token_hex(16))
        user_seed = headers.get(USER_SEED)
        check_name("X-Request-Id", request_id, do="send such an id, or none")
        check_name("X-Assay-User-Seed", user_seed or "", do="send such a seed, or none", fewest=0)
        self.recorder.sink.check(client)
        later = self.settings.responses_block == "next"
        block = await self.next_block(self.settings.responses_wait) if later else self.newest
        chosen_by: Literal["client", "server"] = "client" if REQUEST_ID in headers else "server"
        template = self.chat_template if path.endswith("/chat/completions") else None
        return (
            None
            if block is None
            else AcceptedRequest(request_id, block, user_seed, chosen_by, template, client)
        )

    def describe(self) -> dict[str, Any]:
        """Return the settings, the block that is known, and how many receipts there were."""
        return {
            "mode": self.settings.responses,
            "public_key": self.settings.responses_public_key,
            "block": self.settings.responses_block,
            "block_hash": self.newest,
            "receipts": {} if self.recorder is None else self.recorder.counts,
        }


@dataclass(eq=False)
class ReceiptMiddleware:
    """Seeds requests to the engine, and names the receipt in the answer's headers.

    An answer whose receipt cannot be stored does not reach its end: it is replaced by the refusal
    where nothing was sent, and else cut off.
    """

    app: ASGIApp
    responses: Responses

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if not asks_engine(scope):
            await self.app(scope, receive, send)
            return
        try:
            client = client_of(scope["client"][0]) if scope.get("client") else None
            accepted = await self.responses.accept(Headers(scope=scope), route_path(scope), client)
        except AssayError as error:
            await answer(refusal_of(error))(scope, receive, send)
            return
        if accepted is None:
            await self.app(scope, receive, partial(_send_unrecorded, send))
            return
        # VLLM makes the id of its answer from it.
        if accepted.chosen_by == "server":
            scope = dict(scope) | {
                "headers": [*scope["headers"], (REQUEST_ID.encode(), accepted.request_id.encode())]
            }
        token = ACCEPTED.set(accepted)
        guarded = _Guarded(scope, receive, send, accepted)
        try:
            await self.app(scope, receive, guarded)
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


@dataclass(eq=False)
class _Guarded:
    """The ``send`` of an answer that is recorded."""

    scope: Connection
    receive: Receive
    plain: Send
    accepted: AcceptedRequest
    head: Message | None = None  # the beginning of the answer, until its first piece is there
    started: bool = False
    refused: bool = False

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message of the answer, or the refusal in place of all of them."""
        if self.accepted.refused is not None:
            return self.refuse()
        if not self.started:
            return self._start(message)
        # Not awaited here: a stream has a message for every token.
        return self.plain(message)

    async def _start(self, message: Message) -> None:
        """Hold the beginning back until the first piece: by then the engine has taken the request,
        or the plugin has refused it.
        """
        if self.head is None:
            self.head = message
            return
        self.started = True
        streams = any(
            name == b"content-type" and b"event-stream" in value
            for name, value in self.head["headers"]
        )
        calls = self.accepted.calls.values()
        # Some streams begin before they call the engine.
        is_recorded = not calls or any(call.choices for call in calls)
        named = {RECEIPT: self.accepted.request_id, BLOCK: self.accepted.block_hash}
        headers = [(name, quote(text).encode()) for name, text in named.items()]
        has_receipt = is_recorded if streams else self.accepted.stored
        await self.plain(_with(self.head, headers if has_receipt else NO_RECEIPT))
        await self.plain(message)

    async def refuse(self) -> None:
        """Send the refusal; cut an answer off that has begun."""
        if self.started:
            raise _CutOff
        if self.accepted.refused is not None and not self.refused:
            self.refused = True
            await answer(refusal_of(self.accepted.refused))(self.scope, self.receive, self.plain)


async def _send_unrecorded(send: Send, message: Message) -> None:
    await send(_with(message, NO_RECEIPT) if message["type"] == "http.response.start" else message)


def _with(message: Message, headers: list[tuple[bytes, bytes]]) -> Message:
    return dict(message) | {"headers": [*message.get("headers", ()), *headers]}
