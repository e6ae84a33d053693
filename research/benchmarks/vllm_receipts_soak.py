"""Ten kills of a serving vLLM: every response that a client received whole has its receipt.

Clients send requests of mixed parameters, with one or three choices, half of them as streams, some
at a time. One that is cut off is sent again under the same id, as clients do. The server is ended
by SIGKILL while they run, and started again on the same data; each is forked from a process that
has imported vLLM, because imports are most of a start. At the end every choice that was received
whole must have a receipt with exactly the tokens that the client got, and all receipts are fetched
as complete files. Exit code 1 if one is missing.

    python research/benchmarks/vllm_receipts_soak.py -o research/results/vllm_receipts_soak.json
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import httpx
from _common import note, parser, publish
from _vllm import SEEDED, ForkedServer, begin, body_of, lines_of, mixed

from assay.models import load_model
from assay.poc.responses import Receipts

CHOICES = 3  # of every third request
LEAST = 0.05  # seconds after a whole response at which the server may be killed


@dataclass
class Clients:
    """Requests, those that are not answered yet, and the tokens of every choice that was received
    whole.
    """

    pending: deque
    at_once: int
    whole: dict = field(default_factory=dict)
    answered: int = 0
    interrupted: int = 0

    async def send(self, server, until, pause):
        """Send what is pending; kill the server a moment after ``until`` responses, or return when
        all are answered.
        """
        reached = asyncio.Event()
        async with httpx.AsyncClient(base_url=server.url, timeout=300.0) as client:
            tasks = [
                asyncio.create_task(self._work(client, until, reached)) for _ in range(self.at_once)
            ]
            gathered = asyncio.gather(*tasks)
            waiting = asyncio.create_task(reached.wait())
            await asyncio.wait([gathered, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not gathered.done():
                await asyncio.sleep(pause)
                await asyncio.to_thread(server.kill)
            await gathered

    async def _work(self, client, until, reached):
        while self.pending:
            number, request = self.pending.popleft()
            try:
                tokens = await received(client, number, request)
            except (
                httpx.HTTPError
            ):  # the server has died; the request is sent again to the next one
                self.interrupted += 1
                self.pending.appendleft((number, request))
                return
            self.whole |= {(request.request_id, index): output for index, output in tokens.items()}
            self.answered += 1
            if self.answered >= until:
                reached.set()


async def received(client, number, request):
    """Send a request and return the tokens of each choice; an HTTP error if the response is not
    whole.
    """
    body = body_of(
        request, n=1 if number % 3 else CHOICES, return_token_ids=True, stream=bool(number % 2)
    )
    headers = {"X-Request-Id": request.request_id}
    if not body["stream"]:
        answer = await client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-assay-receipt"] == request.request_id
        return {choice["index"]: tuple(choice["token_ids"]) for choice in answer.json()["choices"]}
    found = {index: [] for index in range(body["n"])}
    ended = False
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        async for line in lines_of(answer):
            ended = ended or line == "data: [DONE]"
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    found[choice["index"]] += choice.get("token_ids") or []
    if not ended:
        raise httpx.RemoteProtocolError("a stream without its end")
    return {index: tuple(tokens) for index, tokens in found.items()}


def exported(server):
    """Return all receipts, fetched in complete files."""
    receipts = []
    after = 0
    more = True
    while more:
        answer = server.client.get("/api/v1/receipts.jsonl", params={"after": after, "limit": 100})
        answer.raise_for_status()
        after = int(answer.headers["receipts-last"])
        more = answer.headers["receipts-more"] == "true"
        if answer.status_code == 200:
            receipts += Receipts.parse("export", answer.content).receipts
    return receipts


def kill_loop(server, requests, *, kills, at_once=8, seed=0):
    """Kill a running server ``kills`` times while it answers, and count; it runs afterwards."""
    chosen = random.Random(seed)
    began = time.monotonic()
    clients = Clients(deque(enumerate(requests)), at_once)
    killed = 0
    for life in range(kills + 1):
        if life:
            server.client.close()
            server.start()
        begin(server)
        until = len(requests) * (life + 1) // (kills + 1) if life < kills else len(requests) + 1
        asyncio.run(clients.send(server, until, chosen.uniform(LEAST, 1.0)))
        killed += server.process.poll() is not None
        note(
            f"{clients.answered} of {len(requests)} answered, {killed} kills, "
            f"{clients.interrupted} cut off"
        )
    receipts = exported(server)
    tokens = {(receipt.request_id, receipt.index, receipt.output) for receipt in receipts}
    per_choice = Counter((receipt.request_id, receipt.index) for receipt in receipts)
    return {
        "requests": len(requests),
        "kills": killed,
        "seconds": round(time.monotonic() - began, 1),
        "responses": clients.answered,
        "interrupted": clients.interrupted,
        "choices": len(clients.whole),
        "receipts": len(receipts),
        "choices_with_several_receipts": sum(count > 1 for count in per_choice.values()),
        "choices_without_receipt": sum(
            (*choice, found) not in tokens for choice, found in clients.whole.items()
        ),
    }


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("--requests", type=int, default=200)
    options_parser.add_argument("--kills", type=int, default=10)
    options_parser.add_argument("--at-once", type=int, default=8)
    options_parser.add_argument("--seed", type=int, default=20)
    chosen = options_parser.parse_args()
    tokenizer = load_model("reference:qwen3").tokenizer
    requests = mixed(chosen.requests, tokenizer, seed=chosen.seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        ForkedServer(folder, environment=SEEDED) as server,
    ):
        figures = kill_loop(
            server, requests, kills=chosen.kills, at_once=chosen.at_once, seed=chosen.seed
        )
    publish(
        "vllm_receipts_soak",
        {"seed": chosen.seed, "at_once": chosen.at_once, **figures},
        chosen.output,
    )
    is_complete = figures["kills"] == chosen.kills and figures["responses"] == chosen.requests
    return int(not is_complete or figures["choices_without_receipt"] > 0)


if __name__ == "__main__":
    sys.exit(main())
