"""A stand-in for vLLM's engine whose responses are recorded, and for the store of their receipts."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import numpy as np

from assay.poc.vllm.recorder import ACCEPTED, Accepted, Recorder

DIGEST = "0" * 64


def params(**values):
    given = {
        "n": 1,
        "seed": None,
        "extra_args": None,
        "logit_bias": None,
        "max_tokens": 9,
        "detokenize": True,
        "temperature": 0.7,
        "top_k": -1,
    }
    given |= {"top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    return SimpleNamespace(output_kind=SimpleNamespace(name="DELTA"), **given | values)


class Sink:
    """Keeps receipts in a list, or refuses them."""

    def __init__(self) -> None:
        self.receipts = []
        self.error = None

    def check(self) -> None:
        """Never refuse."""

    async def store(self, receipt) -> None:
        if self.error:
            raise self.error
        await asyncio.sleep(0)
        self.receipts.append(receipt)


class LLM:
    """As much of an ``AsyncLLM`` as is wrapped: every choice says its own number, some times over."""

    def __init__(self, turns: int = 3, pause: float = 0.0) -> None:
        self.output_processor = SimpleNamespace(add_request=lambda *given: None, process_outputs=lambda *given: None)
        self.turns, self.pause = turns, pause
        self.sent = []
        self.calls = []
        self.sketches = True

    async def generate(self, prompt, sampling_params, request_id, **options) -> AsyncGenerator:
        parent = SimpleNamespace(sampling_params=sampling_params) if sampling_params.n > 1 else None
        for index in range(sampling_params.n):
            request = SimpleNamespace(request_id=f"{index}_{request_id}-ab", external_req_id=request_id)
            plain = {"prompt_embeds": None, "mm_features": None, "lora_request": None, "resumable": False}
            vars(request).update(plain | options, sampling_params=sampling_params, prompt_token_ids=prompt)
            self.output_processor.add_request(request, None, parent, index, None)
            self.sent.append(request)
        for turn in range(self.turns):
            finish = "stop" if turn == self.turns - 1 else None
            mine = [one for one in self.sent if one.external_req_id == request_id]
            self.output_processor.process_outputs(
                [SimpleNamespace(request_id=one.request_id, new_token_ids=[0]) for one in mine]
            )
            await asyncio.sleep(self.pause)
            yield SimpleNamespace(
                outputs=[
                    SimpleNamespace(index=index, token_ids=[index], finish_reason=finish)
                    for index in range(sampling_params.n)
                ]
            )

    async def collective_rpc(self, method, args):
        self.calls.append((method, *args))
        if not self.sketches:
            return [{}, {}]
        return [
            {name: np.arange(*numbers).repeat(12).astype(np.float16).tobytes() for name, numbers in args[0].items()}
        ]


def recorded(llm: LLM, sink: Sink, seeded: bool = True) -> Recorder:
    return Recorder(llm, sink, public_key="node", digest=DIGEST, seeded=seeded)


async def ask(llm: LLM, accepted: Accepted | None, prompts=((5, 6),), stop_after: int = 9, **given) -> int:
    """Ask as a route does for the prompts of one request; return how many outputs came."""
    ACCEPTED.set(accepted)
    calls = [llm.generate(prompt, params(**given), f"cmpl-{i}") for i, prompt in enumerate(prompts)]
    count = 0
    for outputs in calls:
        async for _ in outputs:
            count += 1
            if count == stop_after:
                await outputs.aclose()
                return count
    return count
