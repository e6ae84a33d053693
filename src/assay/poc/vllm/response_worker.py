"""The part in vLLM's workers that sketches the hidden state of every 32nd token.

What a worker must know of a response comes with its request, in ``extra_args`` of its
``SamplingParams``. Two methods of the model runner are wrapped as
:class:`assay.poc.vllm.WorkerExtension` does it, and for its reasons: ``execute_model`` names the
new requests, and while ``sample_tokens`` begins the hidden states of a step are there. The state at
position ``prompt - 1 + t`` of a request gives token t. While the same requests decode, the step of
the next such state is known, and those before it are not looked at. States are copied once a step,
all together, and become sketches a few dozen at a time.

On a GPU the engine launches steps ahead, and whatever waits for one of them leaves the device
without the next. So places go there from pinned memory, and sketches are made on a stream of their
own, of the steps that the device has done. A sketch that the serving side asks for is one of these:
it has seen the token.

Legend of shapes: N requests or positions of a step, L positions of one request, D hidden size, S
sketches.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from assay import streams
from assay.models.device import to_device
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE
from assay.poc.protocol.transforms import sketch_states
from assay.poc.responses.sampling import Sampling
from assay.poc.vllm.compatibility import runner_kind
from assay.poc.vllm.rows import call_before, is_first_of_group, spans
from assay.poc.vllm.worker import WorkerExtension

# Numbers of projections that are made at once: vLLM leaves little of a GPU's memory free.
MOST_NORMALS = 2**22
MOST_RESPONSES = 8192
"""Responses whose sketches a worker keeps; beyond them the oldest are dropped, which the server
side left behind.
"""

STEPS_AHEAD = (
    4  # steps of drafts by which a runner's positions on the host may be wrong: two are in flight
)
NEVER = 2**40  # length of a prompt that never ends
# key of `extra_args`. What a client puts there is thrown away before a request reaches the workers
ARGUMENT = "assay"


@dataclass(frozen=True)
class SeedArgument:
    """What the workers need to know of one response."""

    prompt: int  # number of its tokens
    sketch: tuple[int, ...]  # words of the stream of projections, 8 integers in [0, 2**32)
    tokens: tuple[int, ...] | None = (
        None  # words of the stream of noise; None where the engine samples by itself
    )
    sampling: Sampling | None = None  # where it does not

    def as_argument(self) -> dict[str, Any]:
        """Return plain values for vLLM's messages, whose maps have no integer keys."""
        values: dict[str, Any] = _seed_adapter().dump_python(self, mode="json")
        return values


@cache
def _seed_adapter() -> "TypeAdapter[SeedArgument]":
    return TypeAdapter(SeedArgument)


def state_argument(prompt: int) -> dict[str, Any]:
    """Return the ``extra_args`` of a request whose states are kept from the prompt's end on."""
    return {ARGUMENT: SeedArgument(prompt, (0,) * 8).as_argument()}


def read_seed_argument(params: Any) -> SeedArgument | None:
    """Return what a ``SamplingParams`` of vLLM carries; None for requests that are not recorded."""
    values = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
    return _seed_adapter().validate_python(values) if isinstance(values, dict) else None


class ResponseExtension(WorkerExtension):
    """Methods that vLLM adds to its workers."""

    def assay_sketch(self, raw: bool = False) -> None:
        """Begin to keep sketches, or with ``raw`` the float32 states for a verifier."""
        if not hasattr(self, "assay_capture"):
            self.assay_capture = Capture(self.model_runner, self.vllm_config, raw=raw)

    def assay_sketches(
        self, ranges: dict[str, list[int]], forgotten: list[str]
    ) -> dict[str, bytes]:
        """Return sketches by number range, and drop requests that have ended.

        One worker of those that share layers returns, by request, the bytes of float16 [S, 12].
        """
        sketches = self.assay_capture.read(
            {name: range(*numbers) for name, numbers in ranges.items()}
        )
        self.assay_capture.drop(forgotten)
        return sketches if is_first_of_group() else {}

    def assay_states(self) -> dict[str, bytes]:
        """Return the states of ended requests as bytes of float32 [S, D], from token 0 on."""
        states = self.assay_capture.read(self.assay_capture.there)
        self.assay_capture.drop(list(states))
        return states if is_first_of_group() else {}


class KeptResponse(NamedTuple):
    """What is kept of one response: its sketches by token, or the states that are to be
    sketched.
    """

    carried: SeedArgument
    sketches: dict[int, bytes]


class SketchedState(NamedTuple):
    """A hidden state to sketch; ``there`` is a tensor where only the device knows."""

    kept: KeptResponse
    token: int
    there: Tensor | None = None


class Capture:
    """The wrapped methods of one model runner, and the sketches that they keep."""

    def __init__(self, runner: Any, config: Any, *, raw: bool = False) -> None:
        self.errors = 0
        self._runner = runner
        self._raw = raw
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        # Requests of the step before, and their tokens in it.
        self._scheduled: dict[str, int] = {}
        # Steps that need no look, if the requests stay the same.
        self._idle = 0
        # The states of each step, and on a GPU the event after which they are there.
        self._waiting: deque[tuple[list[SketchedState], list[Tensor], Any]] = deque()
        speculative = getattr(config, "speculative_config", None)
        drafts = int(speculative.num_speculative_tokens or 0) if speculative is not None else 0
        self._slack = STEPS_AHEAD * drafts if runner_kind(runner) == "v2" else 0
        self._device = torch.device(runner.device)
        on_gpu = self._device.type == "cuda"
        self._aside: Any = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._at_once = max(
            1, MOST_NORMALS // (SKETCH_SIZE * int(config.model_config.get_hidden_size()))
        )
        call_before(runner, "execute_model", self._open, self)
        call_before(runner, "sample_tokens", self._capture, self)

    @property
    def there(self) -> dict[str, range]:
        """The requests that have kept states, and the numbers of their sketches."""
        self._flush()
        return {name: range(len(response.sketches)) for name, response in self._kept.items()}

    def read(self, ranges: dict[str, range]) -> dict[str, bytes]:
        """Return sketches of requests by number, up to the first missing one."""
        self._flush()
        bytes_by_name = {}
        for name, numbers in ranges.items():
            sketches_of_request = self._kept[name].sketches if name in self._kept else {}
            places = takewhile(
                sketches_of_request.__contains__, (SKETCH_EVERY * number for number in numbers)
            )
            bytes_by_name[name] = b"".join(sketches_of_request[place] for place in places)
        return bytes_by_name

    def drop(self, names: list[str]) -> None:
        """Forget requests that have ended, or whose clients have left."""
        for name in names:
            self._kept.pop(name, None)

    def _open(self, scheduler_output: Any = None, *args: Any, **kwargs: Any) -> None:
        """Note the new requests that are recorded. One that was preempted may come again, and is
        known.
        """
        for request in getattr(scheduler_output, "scheduled_new_reqs", ()):
            carried = read_seed_argument(request.sampling_params)
            if carried is not None and request.req_id not in self._kept:
                self._kept[request.req_id] = KeptResponse(carried, {})
        while len(self._kept) > MOST_RESPONSES:
            self.drop([next(iter(self._kept))])
        # The steps in which nothing can be due are counted down while the same requests go on by
        # one token each.
        scheduled = getattr(scheduler_output, "num_scheduled_tokens", None) or {}
        goes_on = scheduled.keys() == self._scheduled.keys() and sum(scheduled.values()) == len(
            scheduled
        )
        self._idle = self._idle - 1 if goes_on and not scheduler_output.scheduled_new_reqs else 0
        self._scheduled = scheduled

    @torch.inference_mode()
    def _capture(self, *args: Any, **kwargs: Any) -> None:
        """Copy the states of this step that are sketched."""
        if not self._kept or self._idle > 0 or (captured := spans(self._runner)) is None:
            return
        states_ND, step = captured
        # The token that the first position of each request gives; a request that is not recorded
        # gives none.
        responses = map(self._kept.get, step.names)
        first_N = (
            step.computed
            + 1
            - np.array(
                [NEVER if response is None else response.carried.prompt for response in responses]
            )
        )
        after_N = first_N + self._slack + step.lengths
        due_N = _next_sketched(first_N - self._slack) < after_N
        if not self._slack:
            self._idle = 1 + int((_next_sketched(after_N) - after_N).min())
        places = []
        step_states = []
        step_rows = []
        for row in np.flatnonzero(due_N):
            first = int(first_N[row])
            start = int(step.starts[row])
            length = int(step.lengths[row])
            response = self._kept[step.names[row]]
            low = int(_next_sketched(first - self._slack))
            for token in range(low, first + self._slack + length, SKETCH_EVERY):
                if self._slack:
                    state, state_1D = self._choose(
                        states_ND[start : start + length], start, response, token
                    )
                    step_rows.append(state_1D)
                else:
                    places.append(start + token - first)
                    state = SketchedState(response, token)
                step_states.append(state)
        if places:
            step_rows.append(states_ND.index_select(0, to_device(places, self._device)))
        if step_states:
            event = (
                None
                if self._aside is None
                else torch.cuda.current_stream(self._device).record_event()
            )
            self._waiting.append((step_states, step_rows, event))
        if sum(len(states) for states, _, _ in self._waiting) >= self._at_once:
            self._flush()

    def _choose(
        self, states_LD: Tensor, start: int, response: KeptResponse, token: int
    ) -> tuple[SketchedState, Tensor]:
        """Copy the state [1, D] at a position that only the device can find: with drafts the host's
        count is a bound.

        A draft that is not accepted leaves a wrong state at its position, which is computed again
        and replaces it.
        """
        positions_L = self._runner.execute_model_state.input_batch.positions[
            start : start + len(states_LD)
        ]
        hits_L = positions_L == response.carried.prompt - 1 + token
        return SketchedState(response, token, hits_L.any()), states_LD.index_select(
            0, hits_L.to(torch.uint8).argmax().reshape(1)
        )

    @torch.inference_mode()
    def _flush(self) -> None:
        """Make sketches of the states of all steps that the device has done."""
        ready = []
        while self._waiting and ((event := self._waiting[0][2]) is None or event.query()):
            ready.append(self._waiting.popleft())
        states = [state for of_step, _, _ in ready for state in of_step]
        if not states:
            return
        with torch.cuda.stream(self._aside):  # of None: nothing changes
            states_SD = torch.cat([rows for _, of_step, _ in ready for rows in of_step])
            if self._raw:
                made_S = states_SD.float().cpu().numpy()
            else:
                words_S8 = torch.tensor(
                    [state.kept.carried.sketch for state in states], dtype=torch.uint32
                )
                tokens_S = torch.tensor([state.token for state in states], dtype=torch.int64)
                seeds_S = streams.get_backend("auto", "cpu").row_seeds(words_S8, tokens_S).numpy()
                parts = [
                    slice(start, start + self._at_once)
                    for start in range(0, len(states), self._at_once)
                ]
                made_S = (
                    torch.cat([sketch_states(states_SD[span], seeds_S[span]) for span in parts])
                    .cpu()
                    .numpy()
                )
            for state, sketch in zip(states, made_S, strict=True):
                if state.there is None or bool(state.there):
                    state.kept.sketches[state.token] = sketch.tobytes()


def _next_sketched(tokens: Any) -> Any:
    """Return the first token, from each of these on, that is sketched."""
    return -(-np.maximum(tokens, 0) // SKETCH_EVERY) * SKETCH_EVERY
