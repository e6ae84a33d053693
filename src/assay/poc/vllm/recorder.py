"""The serving side: seeds clients' requests, and stores a receipt before each answer ends.

Two methods are wrapped, on the instances of one ``AsyncLLM``; the :class:`Collector` of sketches
wraps a third. ``generate``, through which every route of the server goes, hands its outputs on, and
stores the receipt of a choice before the output that ends it. ``add_request`` of the output
processor is called once for every choice, with its number: there the request that goes to the
engine gets temperature 0 and what its logits processor needs, while the server keeps the parameters
that the client sent. Bodies of requests are not read and not changed, so that every route and every
client works as before.

What the client fixed before the engine saw anything is an :class:`AcceptedRequest` in the context
of its HTTP request. Calls without one, those of nonces among them, pass through.
"""

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from assay.errors import AssayError, ModelError, reason_of
from assay.files.names import normal_form
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE, sketch_steps
from assay.poc.responses.receipts import Adapter, Prompt, Receipt, ReceiptHeader, digest_adapter
from assay.poc.responses.sampling import Sampling
from assay.poc.service.receipt_keeper import ReceiptSink
from assay.poc.vllm.client import call_workers
from assay.poc.vllm.response_worker import ARGUMENT, SeedArgument

log = logging.getLogger("assay.responses")

FINISHES: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}
"""Why a response ended, as a receipt says it, by vLLM's word; every other word is an abort."""

MASKS = (
    "structured_outputs",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "thinking_token_budget",
)
"""Parameters of vLLM that forbid or force tokens in a way that a receipt does not repeat."""

SAMPLED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
NEUTRAL = {name: getattr(Sampling(temperature=0.0), name) for name in SAMPLED} | {
    "logit_bias": None,
    "seed": None,
}
"""What vLLM's own sampler is told of a seeded request: take the largest score."""

PAUSE = 0.02  # seconds between two calls for sketches
PUT_OFF = 0.1  # seconds more if no response waits
BYTES = SKETCH_SIZE * np.dtype(np.float16).itemsize  # of one sketch

ACCEPTED: "ContextVar[AcceptedRequest | None]" = ContextVar("assay_accepted", default=None)
"""The HTTP request in whose context the engine is called."""


@dataclass(eq=False)
class Choice:
    """One response in the making: what its receipt will say, and its sketches so far."""

    engine_id: str  # of its request in the engine
    stated: Receipt  # its receipt, as far as the request says it: without an output
    output: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length", "abort"] = ""

    tokens: int = 0  # that the engine has handed out, of which the server may not have the last
    asked: int = 0  # number of sketches
    found: bytearray = field(default_factory=bytearray)  # sketches that were taken
    waiter: "asyncio.Future[None] | None" = None

    @property
    def taken(self) -> int:
        """Number of sketches that were taken."""
        return len(self.found) // BYTES

    @property
    def due(self) -> int:
        """Number of sketches that there are of its tokens."""
        return len(sketch_steps(self.tokens))

    def wake(self, error: Exception | None = None) -> None:
        """Wake who waits for the last sketches, with an error if the workers did not answer."""
        if self.waiter is not None and not self.waiter.done():
            if error is None:
                self.waiter.set_result(None)
            else:
                self.waiter.set_exception(error)

    def receipt(self) -> Receipt:
        """Return the receipt of an ended response; a ModelError where a sketch is missing."""
        steps = self.due
        # A copy: a call that runs may still bring those of tokens after the end.
        sketches = np.frombuffer(bytes(self.found), np.float16).reshape(-1, SKETCH_SIZE)
        if len(sketches) < steps:
            raise ModelError(
                f"{len(sketches)} sketches of {len(self.output)} tokens",
                wanted=f"{steps}",
                do="see the log of vLLM's workers",
            )
        return replace(
            self.stated,
            output=tuple(self.output),
            finish=self.finish or "abort",
            sketches=sketches[:steps],
        )


class Collector:
    """Takes the sketches of one engine's responses from its workers, while the responses go on.

    A receipt needs every sketch. Were all of them asked for at the end, every answer would wait for
    a call into the engine's loop, which is answered between two steps. So the tokens that the
    engine hands out are counted, a sketch is asked for once its token is there, and a response that
    ends waits only where its last sketch is of the last few steps. Calls interrupt the engine: one
    asks for all sketches that are due, and is put off while no response waits.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._open: dict[str, Choice] = {}
        self._due: dict[str, Choice] = {}
        self._called: dict[str, Choice] = {}
        self._forgotten: list[str] = []
        self._running: asyncio.Task[None] | None = None
        self._waits: asyncio.Event  # of the task that runs
        self._process = llm.output_processor.process_outputs
        llm.output_processor.process_outputs = self._wrapped_process

    def follow(self, choice: Choice) -> None:
        """Count the tokens of a response that begins."""
        self._open[choice.engine_id] = choice

    def forget(self, choices: Iterable[Choice]) -> None:
        """Drop responses, here and with the next call in the workers."""
        for choice in choices:
            self._due.pop(choice.engine_id, None)
            if self._open.pop(choice.engine_id, None) is not None:
                self._forgotten.append(choice.engine_id)

    async def finish(self, choices: list[Choice]) -> None:
        """Wait for the sketches of ended responses; a ModelError where no worker answers."""
        waiters = []
        for choice in choices:
            choice.tokens = len(choice.output)
            if choice.taken < choice.due:
                choice.waiter = asyncio.get_running_loop().create_future()
                waiters.append(choice.waiter)
                if choice.asked < choice.due or choice.engine_id not in self._called:
                    self._ask(choice)
                self._waits.set()
        try:
            await asyncio.gather(*waiters)
        finally:
            self.forget(choices)

    def _wrapped_process(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the tokens of a step before the server sees them."""
        for output in outputs:
            choice = self._open.get(output.request_id)
            # Until it hears of a stop text, the engine goes on after it.
            if choice is not None and not choice.finish:
                choice.tokens += len(output.new_token_ids)
                # More are due, without a range for every token.
                if choice.tokens > SKETCH_EVERY * choice.asked:
                    self._ask(choice)
        return self._process(outputs, *args, **kwargs)

    def _ask(self, choice: Choice) -> None:
        self._due[choice.engine_id] = choice
        choice.asked = choice.due
        if self._running is None or self._running.done():
            self._waits = asyncio.Event()
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._due:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._waits.wait(), PUT_OFF)
            due = -1
            # Responses that end in one step: the server wakes them a part at a time.
            while len(self._due) > due:
                due = len(self._due)
                await asyncio.sleep(0)
            self._waits.clear()
            self._called = self._due
            self._due = {}
            forgotten = self._forgotten
            self._forgotten = []
            ranges = {name: [choice.taken, choice.due] for name, choice in self._called.items()}
            try:
                replies = await call_workers(self._llm, "assay_sketches", ranges, forgotten)
                for name, data in (item for reply in replies for item in reply.items()):
                    self._called[name].found += data
                for name, choice in self._called.items():
                    # One that ended since waits for the next call.
                    if ranges[name][1] >= choice.due:
                        choice.wake()
            except Exception as error:
                failed = ModelError(
                    f"no sketches: {reason_of(error)[:300]}",
                    wanted="workers that run",
                    do="see the log of vLLM",
                )
                for choice in self._called.values():
                    choice.wake(failed)
            self._called = {}
            await asyncio.sleep(PAUSE)


@dataclass
class ChatCall:
    """One call of ``generate``, which makes one or more choices of an answer."""

    first: int
    deltas: bool
    choices: dict[int, Choice] = field(default_factory=dict)

    def take(self, output: Any) -> list[Choice]:
        """Add the tokens of an output to their choices; return the choices that it ends."""
        ended = []
        for part in output.outputs:
            choice = self.choices.get(part.index)
            if choice is None or choice.finish:
                continue
            if not self.deltas:
                choice.output.clear()
            choice.output.extend(part.token_ids)
            if part.finish_reason is not None:
                choice.finish = FINISHES.get(part.finish_reason, "abort")
                ended.append(choice)
        return ended


@dataclass
class AcceptedRequest:
    """An HTTP request, as far as it was fixed before the engine saw it."""

    request_id: str
    block_hash: str
    user_seed: str | None = None  # of a header; None leaves it to the field `seed` of the body
    chosen_by: Literal["client", "server"] = "server"
    chat_template: str | None = None  # SHA-256 of the one that makes the prompt, where it is known
    client: str | None = None  # who asked, as client_of() says it
    refused: AssayError | None = None  # for which a receipt could not be stored
    stored: int = 0  # number of its receipts
    count: int = 0  # of its choices
    calls: dict[str, ChatCall] = field(default_factory=dict)

    def expect(self, engine_id: str, params: Any) -> ChatCall:
        """Count the choices of a call, numbered through all prompts of the request."""
        call = self.calls[engine_id] = ChatCall(self.count, params.output_kind.name == "DELTA")
        self.count += params.n
        return call


class Recorder:
    """Seeds the requests of one engine, and stores a receipt of every response.

    The workers have the :class:`ResponseExtension`, and where it is ``seeded`` the logits
    processor. Else the engine samples, and receipts have sketches only. ``header`` is that of
    the receipts.
    """

    def __init__(self, llm: Any, sink: ReceiptSink, *, header: ReceiptHeader, seeded: bool) -> None:
        self.sink = sink
        self.counts = {"stored": 0, "unrecorded": 0, "failed": 0}
        self._header = header
        self._seeded = seeded
        self._collector = Collector(llm)
        self._adapters: dict[tuple[str, str], Adapter] = {}
        self._generate = llm.generate
        self._add_request = llm.output_processor.add_request
        llm.generate = self._wrapped_generate
        llm.output_processor.add_request = self._wrapped_add

    def _wrapped_generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any]:
        # A plain function: the choices of several prompts are numbered in the order of the calls.
        outputs = self._generate(prompt, sampling_params, request_id, **options)
        accepted = ACCEPTED.get()
        if accepted is None:
            return outputs  # type: ignore[no-any-return]
        lora = options.get("lora_request")
        return self._recorded(outputs, accepted, accepted.expect(request_id, sampling_params), lora)

    async def _recorded(
        self, outputs: Any, accepted: AcceptedRequest, call: ChatCall, lora: Any
    ) -> AsyncGenerator[Any]:
        if lora is not None and ((key := _key(lora)) not in self._adapters or lora.load_inplace):
            # An adapter whose files are not here stays unknown, and without receipts.
            with suppress(AssayError):
                self._adapters[key] = Adapter(
                    key[0], await asyncio.to_thread(digest_adapter, key[1])
                )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if ended := call.take(output):
                        await self._store(accepted, ended)
                    yield output
        finally:
            self._collector.forget(choice for choice in call.choices.values() if not choice.finish)

    async def _store(self, accepted: AcceptedRequest, choices: list[Choice]) -> None:
        """Store the receipts of choices that have ended; without all of them the client must not
        get the end.
        """
        try:
            await self._collector.finish(choices)
            receipts = [choice.receipt() for choice in choices]
            await asyncio.gather(
                *(self.sink.store(receipt, client=accepted.client) for receipt in receipts)
            )
        except AssayError as error:
            accepted.refused = error
            self.counts["failed"] += len(choices)
            log.error("no receipt of %s: %s", accepted.request_id, error.seen)
            raise
        self.counts["stored"] += len(choices)
        accepted.stored += len(choices)

    def _wrapped_add(
        self, request: Any, prompt: Any, parent: Any = None, index: int = 0, queue: Any = None
    ) -> None:
        """Seed the request of one choice. The output processor keeps the client's own
        parameters.
        """
        accepted = ACCEPTED.get()
        params = request.sampling_params
        call = None if accepted is None else accepted.calls.get(request.external_req_id)
        if accepted is not None and call is not None:
            try:
                params = self._seed(accepted, call, request, parent, index)
            except AssayError as error:  # the middleware answers with it
                accepted.refused = error
                raise
        elif params is not None and ARGUMENT in (params.extra_args or {}):
            params = _with(params, None)
        self._add_request(request, prompt, parent, index, queue)
        request.sampling_params = params

    def _seed(
        self, accepted: AcceptedRequest, call: ChatCall, request: Any, parent: Any, index: int
    ) -> Any:
        """Return the parameters with which the engine runs a choice, and expect its outputs."""
        params = request.sampling_params
        lora = request.lora_request
        adapter = None if lora is None else self._adapters.get(_key(lora))
        if not _is_plain(request) or (adapter is None) != (lora is None):
            self.counts["unrecorded"] += 1
            return _with(params, None)
        seed_of_request = (parent.sampling_params if parent is not None else params).seed
        user_seed = (
            accepted.user_seed
            if accepted.user_seed is not None
            else ""
            if seed_of_request is None
            else str(seed_of_request)
        )
        sampling = None
        if self._seeded:
            values = {name: getattr(params, name) for name in SAMPLED} | {
                "top_k": max(0, params.top_k)
            }
            sampling = Sampling(**values, logit_bias=dict(params.logit_bias or {}))
        stated = Receipt(
            user_seed=user_seed,
            request_id=accepted.request_id,
            index=call.first + index,
            block_hash=accepted.block_hash,
            prompt=Prompt.of(request.prompt_token_ids),
            output=(),
            sketches=np.zeros(0, np.float16),
            sampling=sampling,
            chosen_by=accepted.chosen_by,
            mask=any(getattr(params, name, None) for name in MASKS),
            adapter=adapter,
            chat_template=accepted.chat_template,
        )
        seed = self._header.seed(stated)
        choice = call.choices[index] = Choice(request.request_id, stated)
        self._collector.follow(choice)
        carried = SeedArgument(
            prompt=stated.prompt.tokens,
            sketch=tuple(seed.words("sketch").tolist()),
            tokens=tuple(seed.words().tolist()) if self._seeded else None,
            sampling=sampling,
        )
        return _with(params, carried)


def _is_plain(request: Any) -> bool:
    """Return whether a receipt can name all that a request was computed from.

    Embeddings have no ids, a trace is not sampled at all, and the steps of a beam search, which
    have numbered ids of their own, are not tokens of a response.
    """
    params = request.sampling_params
    return bool(
        request.prompt_token_ids
        and request.prompt_embeds is None
        and not request.mm_features
        and not request.resumable
        and not getattr(params, "trace_decode_token_ids", None)
        and not (
            "-beam-" in str(request.external_req_id)
            and params.max_tokens == 1
            and not params.detokenize
        )
    )


def _key(lora: Any) -> tuple[str, str]:
    return normal_form(str(lora.lora_name)), str(lora.lora_path)


def _with(params: Any, carried: SeedArgument | None) -> Any:
    """Return a copy of parameters that carries something else, and has nothing left to sample if it
    is seeded.
    """
    changed = copy.copy(params)
    changed.__dict__.pop("sampling_type", None)  # vLLM caches it
    changed.extra_args = {
        key: value for key, value in (params.extra_args or {}).items() if key != ARGUMENT
    } | ({} if carried is None else {ARGUMENT: carried.as_argument()})
    if carried is not None and carried.tokens is not None:
        for name, value in NEUTRAL.items():
            setattr(changed, name, value)
    return changed
