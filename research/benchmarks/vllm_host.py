"""What seeded responses cost the host in one decoding step, without an engine: processor, capture, recorder, receipt.

Batches are made up, of 32 and 128 requests. On a CPU the vocabulary is small, so that what is left is the host's part;
with --gpu operations are launched, and nothing waits for them. Times are those of the processor, not of the clock:
other work on the machine hardly changes them. The smallest of several turns counts. It needs vLLM, for the base class
of the logits processor.

    python vllm_host.py -o results/vllm_host.json
    python vllm_host.py --gpu
"""

import asyncio
import os
import time
from types import SimpleNamespace

import numpy as np
import torch
from _common import note, parser, publish
from torch.utils._python_dispatch import TorchDispatchMode

from assay.poc.responses import ResponseSeed, Sampling
from assay.poc.responses.vllm import Accepted, ProcessorV2, Recorder
from assay.poc.responses.vllm._carried import ARGUMENT, Carried, as_words
from assay.poc.responses.vllm._extension import Capture
from assay.poc.responses.vllm._recorder import Call, Choice, _receipt

ROWS = (32, 128)
PROMPT, TOKENS, WIDTH, SLOTS = 64, 128, 64, 256
VOCABULARY = {"cpu": 64, "cuda": 151936}
TURNS, STEPS = 7, 320


class Operations(TorchDispatchMode):
    """Counts the operations of torch, views included."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Count one."""
        self.count += 1
        return function(*arguments, **(options or {}))


def microseconds(run, prepare=lambda: None):
    """Return the processor time of one call, without that of what prepares it."""

    def least(call):
        found = []
        for _ in range(TURNS):
            begun = time.process_time()
            for _ in range(STEPS):
                call()
            found.append((time.process_time() - begun) / STEPS)
        return 1e6 * min(found)

    return least(lambda: run(prepare())) - least(prepare)


def seed_of(number):
    """Return the seed of a request."""
    return ResponseSeed(user_seed=str(number), request_id="r", public_key="K", digest="0" * 64, block_hash="B", index=0)


def params(number, sampling):
    """Return parameters that carry a request, as a worker gets them."""
    seed = seed_of(number)
    carried = Carried(PROMPT, as_words(seed.words("sketch")), as_words(seed.words()), sampling)
    return SimpleNamespace(extra_args={ARGUMENT: carried.as_argument()})


def processor(device, rows, sampling, *, changes=False):
    """Return the cost of a step of the V2 processor; with ``changes`` every second step has another batch."""
    vocabulary = VOCABULARY[device]
    states = SimpleNamespace(device=torch.device(device), max_num_reqs=SLOTS, vocab_size=vocabulary)
    made = ProcessorV2(SimpleNamespace(speculative_config=None), states)
    for slot in range(rows + 1):
        made.add_request(slot, params(slot, sampling))
    batches = [np.arange(rows), np.r_[np.arange(1, rows), rows]]
    logits, step = torch.randn(rows, vocabulary, device=device), iter(range(10**9))

    def prepare():
        at = next(step)
        slots = batches[at // 2 % 2 if changes else 0]
        places, lengths = torch.from_numpy(slots), np.full(rows, PROMPT + at % 400, np.int32)
        return logits.clone(), SimpleNamespace(
            expanded_idx_mapping=places,
            idx_mapping=places,
            idx_mapping_np=slots,
            pos=torch.full((rows,), int(lengths[0]) - 1),
            seq_lens_upper_bound_np=lengths,
        )

    def run(given):
        made.apply(*given)

    cost = microseconds(run, prepare)
    run(prepare())
    given = prepare()
    with Operations() as operations:
        run(given)
    return {"us": cost, "operations": operations.count}


def capture(device, rows):
    """Return the cost of a step of the capture, the one in 32 with sketches included."""
    kind = type("Runner", (), {"__module__": "vllm.v1.worker.gpu.model_runner", "device": device})
    runner = kind()
    runner.execute_model = runner.sample_tokens = lambda *_: None
    config = SimpleNamespace(speculative_config=None, model_config=SimpleNamespace(get_hidden_size=lambda: WIDTH))
    made = Capture(runner, config)
    names = [f"cmpl-{number}" for number in range(rows)]
    news = [
        SimpleNamespace(req_id=name, sampling_params=params(number, Sampling())) for number, name in enumerate(names)
    ]
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=news, num_scheduled_tokens=dict.fromkeys(names, PROMPT)))
    states, step, ends = torch.randn(rows, WIDTH, device=device), iter(range(10**9)), np.arange(rows + 1)

    def prepare():
        batch = SimpleNamespace(
            req_ids=list(names),
            num_reqs=rows,
            query_start_loc_np=ends,
            num_computed_tokens_np=np.full(rows, PROMPT - 1 + next(step)),
        )
        output = SimpleNamespace(scheduled_new_reqs=[], num_scheduled_tokens=dict.fromkeys(names, 1))
        return output, SimpleNamespace(hidden_states=states, input_batch=batch)

    def run(given):
        output, runner.execute_model_state = given
        runner.execute_model(output)
        runner.sample_tokens(None)

    cost = microseconds(run, prepare)
    assert not made.errors
    return {"us": cost}


def serving():
    """Return the cost of the API server: of a token of a stream, and of the receipt at its end."""

    class Sink:
        async def store(self, receipt):
            """Drop it."""

    pieces = [
        SimpleNamespace(outputs=[SimpleNamespace(index=0, token_ids=[token], finish_reason=None)])
        for token in range(TOKENS)
    ]

    async def stream():
        for piece in pieces:
            yield piece

    llm = SimpleNamespace(generate=stream, output_processor=SimpleNamespace(add_request=None, process_outputs=None))
    recorder = Recorder(llm, Sink(), public_key="K", digest="0" * 64, seeded=True)
    choice = Choice("engine", seed_of(0), Sampling(), tuple(range(PROMPT)), False)
    loop = asyncio.new_event_loop()

    async def read(outputs):
        async for _ in outputs:
            pass

    def recorded():
        call = Call(0, deltas=True, choices={0: choice})
        choice.output.clear()
        return recorder._recorded(stream(), Accepted("r", "B"), call, None)

    per_token = microseconds(lambda _: loop.run_until_complete(read(recorded())))
    per_token -= microseconds(lambda _: loop.run_until_complete(read(stream())))
    choice.output, choice.finish = list(range(TOKENS)), "length"
    sketches = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float16)
    receipt = microseconds(lambda _: _receipt(choice, sketches).without_prompt().line())
    return {"us_of_a_token": per_token / TOKENS, "us_of_a_receipt": receipt}


def main():
    made = parser(__doc__)
    made.add_argument("--gpu", action="store_true", help="launch what a step does on a GPU, with a real vocabulary")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if arguments.gpu else "cpu"
    figures = {}
    for rows in ROWS:
        figures[f"{rows} requests"] = {
            "processor": processor(device, rows, Sampling()),
            "processor, temperature 0.7": processor(device, rows, Sampling(temperature=0.7)),
            "processor, batch changes every second step": processor(device, rows, Sampling(), changes=True),
            "capture": capture(device, rows),
        }
        note(f"{rows}: {figures[f'{rows} requests']}")
    publish("vllm_host", {**figures, "serving": serving(), "load": os.getloadavg()}, arguments.output)


if __name__ == "__main__":
    main()
