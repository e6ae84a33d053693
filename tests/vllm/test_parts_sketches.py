"""The workers' part of recorded responses: what is carried to them, and the sketches that they keep."""

from types import SimpleNamespace

import numpy as np
import torch

from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.protocol.sketches import sketches
from assay.poc.responses import Sampling
from assay.poc.responses.sampling import step_seeds
from assay.poc.vllm.carried import ARGUMENT, Carried, History, as_words, carried_by
from assay.poc.vllm.response_worker import Capture, _next_sketched
from assay.poc.vllm.worker_state import spans

WIDTH = 16


def test_what_is_carried_comes_back_and_what_others_put_there_does_not():
    sampling = Sampling(temperature=0.5, logit_bias={3: 1.0, 70: -2.0})
    for carried in (Carried(5, (1,) * 8, (2,) * 8, sampling), Carried(5, (1,) * 8)):
        assert carried_by(SimpleNamespace(extra_args={ARGUMENT: carried.as_argument()})) == carried
    for other in (None, {}, {"kv": 1}, {ARGUMENT: [1, 2]}, {ARGUMENT: "x"}):
        assert carried_by(SimpleNamespace(extra_args=other)) is None


def test_history_counts_what_is_new_and_skips_tokens_that_are_not_there_yet():
    history = History([[1, 1, 2], [0, 5]], 5, torch.device("cpu"))
    outputs = [[3], [-1]]
    history.update(outputs)
    outputs[0] += [3, 4]
    seen = history.update(outputs)
    assert seen["prompt_NV"].tolist() == [[False, True, True, False, False], [True] + [False] * 4]
    assert seen["counts_NV"].tolist() == [[0, 0, 0, 2, 1], [0] * 5]


class Runner:
    """A model runner of the V1 kind, whose states name their position."""

    device = "cpu"

    def __init__(self) -> None:
        self.execute_model_state = None
        self.input_batch = None

    def execute_model(self, scheduler_output):
        """Do nothing."""

    def sample_tokens(self):
        """Do nothing."""


CONFIG = SimpleNamespace(model_config=SimpleNamespace(get_hidden_size=lambda: WIDTH), speculative_config=None)


def state_of(name: str, position: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(hash(name) % 1000 + position))


def step(runner: Runner, spans: dict[str, tuple[int, int]], new=()):
    """Run positions [computed, computed + length) of requests."""
    lengths = {name: length for name, (_, length) in spans.items()}
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens=lengths))
    rows = [
        state_of(name, at) for name, (computed, length) in spans.items() for at in range(computed, computed + length)
    ]
    runner.input_batch = SimpleNamespace(
        req_ids=list(spans),
        num_computed_tokens_cpu=[computed for computed, _ in spans.values()],
        num_prompt_tokens=[0] * len(spans),
    )
    runner.execute_model_state = SimpleNamespace(
        hidden_states=torch.stack(rows), scheduler_output=SimpleNamespace(num_scheduled_tokens=lengths)
    )
    runner.sample_tokens()


def new_request(name: str, prompt: int, words):
    argument = Carried(prompt, as_words(words)).as_argument()
    return SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args={ARGUMENT: argument}))


def test_the_states_behind_every_32nd_token_are_sketched_through_chunks_and_preemption():
    runner, words = Runner(), np.arange(8, dtype=np.uint32)
    capture = Capture(runner, CONFIG)
    step(runner, {"x": (0, 4), "a": (0, 6)}, [new_request("a", 10, words)])
    step(runner, {"a": (6, 4), "x": (4, 1)})  # ends the prompt: token 0
    for at in range(10, 30):
        step(runner, {"x": (at, 1), "a": (at, 1)})
    step(runner, {"a": (0, 41)}, [new_request("a", 10, words)])  # preempted, and all computed again: token 31 is next
    for at in range(41, 80):
        step(runner, {"a": (at, 1)})
    given = capture.read({"a": range(3), "x": range(3), "unknown": range(1)})
    assert (given["x"], given["unknown"]) == (b"", b"")
    found = np.frombuffer(given["a"], np.float16).reshape(-1, 12)
    states = torch.stack([state_of("a", 9 + token) for token in (0, 32, 64)])
    assert found.tolist() == sketches(states, step_seeds(words, [0, 32, 64])).numpy().tolist()
    assert capture.read({"a": range(1, 2)})["a"] == given["a"][24:48]
    assert capture.errors == 0


def test_steps_in_which_nothing_can_be_due_are_not_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr("assay.poc.vllm.response_worker.spans", lambda runner: looked.append(1) or spans(runner))
    runner, words = Runner(), np.arange(8, dtype=np.uint32)
    capture = Capture(runner, CONFIG)
    news = [new_request(name, prompt, words) for name, prompt in (("a", 10), ("b", 6))]
    step(runner, {"a": (0, 10), "b": (0, 6)}, news)
    for at in range(10, 80):
        if at == 30:  # one waits for a step, and its next sketch comes a step later than it would have
            step(runner, {"a": (at, 1)})
        else:
            step(runner, {"a": (at, 1), "b": (at - 4 - (at > 30), 1)})
    found = capture.read(dict.fromkeys("ab", range(3)))
    for name, prompt in (("a", 10), ("b", 6)):
        states = torch.stack([state_of(name, prompt - 1 + token) for token in (0, 32, 64)])
        made = np.frombuffer(found[name], np.float16).reshape(-1, 12)
        assert made.tolist() == sketches(states, step_seeds(words, [0, 32, 64])).numpy().tolist()
    assert len(looked) < 12
    assert capture.errors == 0


def test_sketches_behind_one_that_is_missing_are_not_handed_out_at_its_place():
    runner = Runner()
    capture = Capture(runner, CONFIG)
    step(runner, {"a": (0, 2)}, [new_request("a", 2, range(8))])
    step(runner, {"a": (65, 1)})
    assert len(capture.read({"a": range(3)})["a"]) == 24


def test_requests_that_are_forgotten_are_dropped():
    runner = Runner()
    capture = Capture(runner, CONFIG)
    step(runner, {"a": (0, 2)}, [new_request("a", 2, range(8))])
    capture.drop(["a", "b"])
    assert capture.read({"a": range(1)}) == {"a": b""}
    assert capture.there == {}


def test_with_drafts_the_state_is_found_by_its_position_and_the_last_one_counts():
    """The host's count of positions is a bound there: two tokens too high at first, and right when they come again."""
    drafting = type("Drafting", (Runner,), {"__module__": "vllm.v1.worker.gpu.model_runner"})
    runner, words = drafting(), np.arange(8, dtype=np.uint32)
    speculative = SimpleNamespace(num_speculative_tokens=2)
    capture = Capture(runner, SimpleNamespace(model_config=CONFIG.model_config, speculative_config=speculative))
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=[new_request("a", 10, words)]))
    for bound, positions, name in ((0, range(10), "a"), (42, (40, 41, 42), "wrong"), (41, (41, 42, 43), "a")):
        batch = {"req_ids": ["a", "padding"], "num_reqs": 1, "query_start_loc_np": np.array([0, len(positions), 99])}
        batch |= {"num_computed_tokens_np": np.array([bound]), "prefill_len_np": np.array([10])}
        batch["positions"] = torch.tensor(list(positions))
        states = torch.stack([state_of(name, at) for at in positions])
        runner.execute_model_state = SimpleNamespace(hidden_states=states, input_batch=SimpleNamespace(**batch))
        runner.sample_tokens()
    found = np.frombuffer(capture.read({"a": range(2)})["a"], np.float16).reshape(-1, 12)
    wanted = sketches(torch.stack([state_of("a", 9), state_of("a", 41)]), step_seeds(words, [0, 32]))
    assert (found.tolist(), capture.errors) == (wanted.numpy().tolist(), 0)


def test_which_tokens_are_sketched():
    assert _next_sketched(np.arange(-40, 70)).tolist() == [0] * 41 + [SKETCH_EVERY] * 32 + [64] * 32 + [96] * 5
