"""Pulling: asks the services of nodes for the nonces that they have found, under the guard of callbacks.

``GET /api/v1/pow/status?after=N`` of a node has its valid nonces above N with their distances, its share, length and
target. What is pulled goes the way of a callback with the same body, and is kept once. Vectors are not offered there.
"""

import asyncio
import hashlib
from typing import Any

import httpx
import structlog

from assay.errors import AssayError
from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.guard import Blocked, resolve
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.validator.claims import Reader, parsed, refused
from assay.poc.validator.controller import Controller
from assay.poc.validator.inbox import Message
from assay.poc.validator.registry import Sender

log = structlog.get_logger("assay.validator.poll")

LONGEST_ANSWER = 2**20
LIMIT = 1000  # nonces of one answer


class Poller:
    """Asks every node that has an address, again and again."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self._service = controller, controller.service
        self._room = asyncio.Semaphore(controller.service.callback_concurrency)

    async def run(self) -> None:
        """Poll until cancelled."""
        timeout = httpx.Timeout(self._service.callback_timeout)
        # trust_env off: a proxy from the environment would resolve names by itself.
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=timeout) as client:
            while True:
                polled = self._controller.registry.polled
                await asyncio.gather(*(self._poll(client, sender) for sender in polled))
                await asyncio.sleep(self._controller.settings.poll_interval)

    async def _poll(self, client: httpx.AsyncClient, sender: Sender) -> None:
        outcome = "failed"
        async with self._room:
            try:
                async with asyncio.timeout(self._service.callback_timeout):
                    outcome = await self.poll(client, sender)
            except Refusal as error:
                outcome = "refused"
                log.warning("poll", reason=error.seen)
            except (Blocked, TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError, AssayError) as error:
                log.warning("poll", reason=f"{type(error).__name__}: {error}"[:200])
        self._controller.metrics.polls.labels(outcome).inc()

    async def poll(self, client: httpx.AsyncClient, sender: Sender) -> str:
        """Take what a node has found since the last time; return ``taken`` or ``empty``.

        Raises:
            Refusal: The node says something other than the pins.
            Blocked: Its address is not allowed.
            httpx.HTTPError: It does not answer.
        """
        state = _state(await self._ask(client, sender, {}))
        if state is None or state["public_key"] != sender.public_key:
            return "empty"  # another key's round: nothing of this node
        block, node_id = state["block_hash"], state["node_id"]
        inbox = self._controller.inbox
        after = await asyncio.to_thread(inbox.pulled, sender.public_key, str(block), _number(node_id))
        values = await self._ask(client, sender, {"after": after, "limit": LIMIT})
        found = _state(values)
        if found is None or (found["block_hash"], found["node_id"]) != (block, node_id):
            return "empty"  # another round began between the two questions
        self._check(found, sender)
        body = {name: found[name] for name in ("public_key", "block_hash", "block_height", "node_id")}
        body |= {"nonces": values.get("valid_nonces"), "dist": values.get("valid_distances")}
        body["r_target"] = values.get("r_target")
        if not body["nonces"]:
            return "empty"
        registry, settings = self._controller.registry, self._controller.settings
        claim = Reader(registry, self._controller.is_open, settings.positions).claim(body, sender)
        text = dumps(body).encode()
        name = f"pull_{hashlib.sha256(text).hexdigest()}"
        pulled = (claim.round.block_hash, claim.round.node_id, claim.nonces[-1])
        message = Message(sender.public_key, name, "pulled", len(claim.nonces), text, pulled)
        await self._controller.writer.keep(message)
        return "taken"

    def _check(self, config: JsonObject, sender: Sender) -> None:
        agreed = self._controller.registry.network.round
        for name, wanted in (("node_count", sender.node_count), ("seq_len", agreed.seq_len)):
            if config.get(name) != wanted:
                raise refused(name, config.get(name), wanted)

    async def _ask(self, client: httpx.AsyncClient, sender: Sender, query: dict[str, int]) -> JsonObject:
        """Return the answer of ``/status``, bounded, from an address that was checked."""
        assert sender.url is not None
        target = await resolve(sender.url, allow_private=self._service.allow_private_callbacks)
        headers = {"Host": target.host_header, "User-Agent": "assay"}
        if sender.read_key is not None:
            headers["Authorization"] = f"Bearer {sender.read_key}"
        url = target.pinned.copy_with(path=f"{target.pinned.path.rstrip('/')}/api/v1/pow/status", params=query or None)
        request = client.build_request("GET", url, headers=headers, extensions={"sni_hostname": target.host})
        response = await client.send(request, stream=True)
        try:
            if not response.is_success:
                raise httpx.HTTPStatusError(f"HTTP {response.status_code}", request=request, response=response)
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > LONGEST_ANSWER:
                    raise httpx.DecodingError(f"an answer of more than {LONGEST_ANSWER} bytes", request=request)
        finally:
            await response.aclose()
        return parsed(bytes(content))[1]


def _state(values: JsonObject) -> dict[str, Any] | None:
    """Return the round of an answer; None where there is no round, or it is not of the published form."""
    config = values.get("config")
    names = ("public_key", "block_hash", "block_height", "node_id")
    return config if isinstance(config, dict) and all(name in config for name in names) else None


def _number(value: object) -> int:
    return value if type(value) is int and 0 <= value <= MAX_NONCE else -1
