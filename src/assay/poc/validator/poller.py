"""Polls nodes that publish distances and send no callbacks."""

import asyncio
import hashlib
from typing import Any

import httpx
import structlog

from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.callback_urls import call, new_client
from assay.poc.net.refusals import Refusal
from assay.poc.net.server import LEAST_CHUNK, MAX_CHUNKS
from assay.poc.net.signatures import parsed
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.validator.claims import refused
from assay.poc.validator.inbox import Message
from assay.poc.validator.intake import claimed_message
from assay.poc.validator.registry import Sender
from assay.poc.validator.validator_controller import ValidatorController

log = structlog.get_logger("assay.validator")

LONGEST_ANSWER = 2**20
LIMIT = 1000  # nonces of one answer
_SHARE = ("public_key", "block_hash", "block_height", "node_id")


class Poller:
    """Asks every node that has an address, again and again, under the guard of callbacks.

    ``GET /api/v1/pow/status?after=N`` of a node has its valid nonces above N with their distances,
    its share, length and target. What is pulled goes the way of a callback with the same body, and
    is kept once. Vectors are not offered there.
    """

    def __init__(self, controller: ValidatorController) -> None:
        self._controller = controller
        self._server = controller.server
        self._room = asyncio.Semaphore(controller.server.callback_concurrency)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with new_client(
            self._server.callback_timeout, self._server.callback_concurrency
        ) as client:
            while True:
                polled = [
                    candidate
                    for candidate in self._controller.registry.senders.values()
                    if candidate.entry.url is not None
                ]
                await asyncio.gather(*(self._poll(client, sender) for sender in polled))
                await asyncio.sleep(self._controller.settings.poll_interval)

    async def _poll(self, client: httpx.AsyncClient, sender: Sender) -> None:
        outcome = "failed"
        async with self._room:
            try:
                async with asyncio.timeout(self._server.callback_timeout):
                    outcome = await self._take(client, sender)
            except Refusal as error:
                outcome = "refused"
                log.warning("poll", reason=error.seen)
            except Exception as error:  # of any kind: it must not end the polling of the others
                log.warning("poll", reason=f"{type(error).__name__}: {error}"[:200])
        self._controller.metrics.polls.labels(outcome).inc()

    async def _take(self, client: httpx.AsyncClient, sender: Sender) -> str:
        """Take what a node has found since the last time; return ``taken`` or ``empty``."""
        state = _state(await self._ask(client, sender, {}))
        if state is None or state["public_key"] != sender.public_key:
            # Another key's round: nothing of this node.
            return "empty"
        block = state["block_hash"]
        node_id = state["node_id"]
        machine = node_id if type(node_id) is int and 0 <= node_id <= MAX_NONCE else -1
        after = await asyncio.to_thread(
            self._controller.inbox.pulled, sender.public_key, str(block), machine
        )
        values = await self._ask(client, sender, {"after": after, "limit": LIMIT})
        round_now = _state(values)
        if round_now is None or (round_now["block_hash"], round_now["node_id"]) != (block, node_id):
            # Another round began between the two questions.
            return "empty"
        reader = self._controller.reader
        seq_len = reader.registry.network.round.seq_len
        for name, wanted in (("node_count", sender.node_count), ("seq_len", seq_len)):
            if round_now.get(name) != wanted:
                raise refused(name, round_now.get(name), wanted)
        if not values.get("valid_nonces"):
            return "empty"
        body = {name: round_now[name] for name in _SHARE} | {"nonces": values["valid_nonces"]}
        body |= {"dist": values.get("valid_distances"), "r_target": values.get("r_target")}
        claim = reader.claim(body, sender)
        text = dumps(body).encode()
        name = f"pull_{hashlib.sha256(text).hexdigest()}"
        pulled = (claim.round.block_hash, claim.round.node_id, claim.nonces[-1])
        message = claimed_message("pulled", name, text, claim, reader, pulled)
        # Anyone on the path could convict the node.
        if not sender.is_proven:
            log.warning("polled over http, so it stays undecided", public_key=sender.public_key)
            message = Message(sender.public_key, name, "pulled", 0, text, pulled=pulled)
        await self._controller.writer.keep(message)
        return "taken"

    async def _ask(
        self, client: httpx.AsyncClient, sender: Sender, query: dict[str, int]
    ) -> JsonObject:
        """Return the answer of ``/status``, bounded, from an address that was checked."""
        url = sender.entry.url
        key = sender.entry.read_key
        assert url is not None
        response = await call(
            client,
            "GET",
            url,
            "/api/v1/pow/status",
            allow_private=self._server.allow_private_callbacks,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            params=query,
        )
        try:
            if not response.is_success:
                raise httpx.HTTPError(f"HTTP {response.status_code}")
            content = bytearray()
            spare = MAX_CHUNKS
            async for chunk in response.aiter_raw():
                content += chunk
                spare += len(chunk) / LEAST_CHUNK - 1
                if len(content) > LONGEST_ANSWER or spare < 0:
                    raise httpx.HTTPError(
                        f"an answer of more than {LONGEST_ANSWER} bytes, or in tiny chunks"
                    )
        finally:
            await response.aclose()
        return parsed(bytes(content))[1]


def _state(values: JsonObject) -> dict[str, Any] | None:
    """Return the round of an answer; None where there is no round, or it is not of the published
    form.
    """
    config = values.get("config")
    return config if isinstance(config, dict) and all(name in config for name in _SHARE) else None
