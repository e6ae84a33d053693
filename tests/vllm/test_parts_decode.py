"""Decoding inside a worker, on fakes of both model runners: tokens, sketches and margins of the definition."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from assay.errors import UsageError
from assay.poc import Round, get_pipeline
from assay.poc.engines.decoding import Draws
from assay.poc.protocol.pipelines import sketch_steps
from assay.poc.vllm.decoding import CLAIMED
from assay.poc.vllm.rows import Spec, new_key, request_id
from assay.poc.vllm.throttle import Throttle, ThrottleSettings
from assay.poc.vllm.worker import Hooks

P, V, D, STEPS = 6, 40, 16, 40
SPEC = Spec(Round(block_hash="b", public_key="k", seq_len=P, preset=f"decode-{STEPS}"), get_pipeline(f"decode-{STEPS}"))
EMBEDDING, HEAD = torch.randn(2, V, D, generator=torch.Generator().manual_seed(0))
NONCES = (3, 8, 20)


class State(NamedTuple):
    scheduler_output: object
    logits: torch.Tensor | None
    hidden_states: torch.Tensor
    input_batch: object


class Runner:
    """As much of the V1 runner as is used, with a model whose state forgets half of the past at every position."""

    def __init__(self) -> None:
        self.device, self.execute_model_state, self.said = torch.device("cpu"), None, []
        self.model = SimpleNamespace(compute_logits=lambda states: states @ HEAD.T)
        self.input_batch = SimpleNamespace()

    def execute_model(self, scheduler_output) -> None:
        """Take new requests."""

    def sample_tokens(self) -> None:
        self.said = self.scores().argmax(dim=1).tolist()

    def scores(self) -> torch.Tensor:
        return self.execute_model_state.logits

    def step(self, batch: dict[str, tuple[list[int], int, int]]) -> None:
        """Run tokens ``ids[computed:computed + length]`` of every request; their states follow all ids before."""
        parts = [states_of(ids)[at : at + length] for ids, at, length in batch.values()]
        states = torch.cat(parts)
        lengths = {name: length for name, (_, _, length) in batch.items()}
        last = np.cumsum(list(lengths.values())) - 1
        computed, prompts = [at for _, at, _ in batch.values()], [P] * len(batch)
        self.input_batch.req_ids = list(batch)
        self.input_batch.num_computed_tokens_cpu, self.input_batch.num_prompt_tokens = computed, prompts
        self.rows = states[last]
        given = SimpleNamespace(
            req_ids=list(batch),
            num_reqs=len(batch),
            query_start_loc_np=np.array([0, *(last + 1)]),
            num_computed_tokens_np=np.array(computed),
            prefill_len_np=np.array(prompts),
        )
        scheduled = SimpleNamespace(num_scheduled_tokens=lengths)
        self.execute_model_state = State(scheduled, self.first_logits(), states, given)
        self.sample_tokens()

    def first_logits(self) -> torch.Tensor | None:
        return self.model.compute_logits(self.rows).to(torch.bfloat16)


class NewRunner(Runner):
    """The V2 runner has no logits before it samples."""

    __module__ = "vllm.v1.worker.gpu.model_runner"

    def first_logits(self) -> torch.Tensor | None:
        return None

    def scores(self) -> torch.Tensor:
        return self.model.compute_logits(self.rows)


def states_of(ids: list[int]) -> torch.Tensor:
    found, state = [], torch.zeros(D)
    for token in ids:
        state = EMBEDDING[token] + state / 2
        found.append(state)
    return torch.stack(found)


def started(runner: Runner, key: str, requests: dict[int, tuple[list[int], list[int] | None]]) -> Hooks:
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: D, get_vocab_size=lambda: V)
    )
    hooks = Hooks(runner, config)
    hooks.open(key, SPEC)
    runner.execute_model(
        SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=f"{request_id(key, nonce)}-abcd",
                    prompt_embeds=None,
                    prompt_token_ids=ids,
                    sampling_params=SimpleNamespace(extra_args=claimed and {CLAIMED: claimed}),
                )
                for nonce, (ids, claimed) in requests.items()
            ]
        )
    )
    return hooks


def defined(rounded: bool) -> tuple[Draws, list[list[int]], np.ndarray]:
    """Return the draws, the tokens and the sketches of the definition, from logits in bfloat16 or float32."""
    draws = Draws(*SPEC, NONCES, seq_len=P, vocab_size=V, device=torch.device("cpu"))
    texts, states = [list(ids) for ids in draws.prompts_BP.tolist()], []
    for step in range(STEPS):
        rows = torch.stack([states_of(ids)[-1] for ids in texts])
        logits = rows @ HEAD.T
        scores = (logits.to(torch.bfloat16) if rounded else logits).float()
        draws.add_noise(scores, step)
        if step in sketch_steps(STEPS):
            states.append(rows)
        for ids, token in zip(texts, scores.argmax(dim=1).tolist(), strict=True):
            ids.append(token)
    return draws, [ids[P:] for ids in texts], draws.sketches(torch.stack(states, 1))


def taken(hooks: Hooks, key: str) -> np.ndarray:
    reply = hooks.collect(key, list(NONCES))
    assert (reply["failed"], reply["nonces"], hooks.errors) == ({}, list(NONCES), 0)
    return np.frombuffer(reply["values"], reply["dtype"]).reshape(len(NONCES), reply["width"])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("assay.poc.vllm.worker.is_first_of_group", lambda: True)


@pytest.mark.parametrize("kind", [Runner, NewRunner])
def test_nonces_decode_the_tokens_of_the_definition_beside_a_stranger(kind):
    runner, key = kind(), new_key()
    draws, tokens, sketches = defined(rounded=kind is Runner)
    prompts = draws.prompts_BP.tolist()
    hooks = started(runner, key, {nonce: (ids, None) for nonce, ids in zip(NONCES, prompts, strict=True)})
    names = [f"{request_id(key, nonce)}-abcd" for nonce in NONCES]
    stranger = [1, 2, 3]
    # The first prompt comes in two chunks; the second begins a step later, and the third is alone at the end.
    runner.step({"x": (stranger, 0, 3), names[0]: (prompts[0], 0, 4)})
    greedy = int((states_of(stranger)[-1] @ HEAD.T).argmax())
    assert runner.said[0] == greedy
    texts = [list(ids) for ids in prompts]
    computed = [4, 0, 0]
    for _ in range(STEPS + 2):
        going = [row for row in range(3) if len(texts[row]) < P + STEPS]
        batch = {names[row]: (texts[row], computed[row], len(texts[row]) - computed[row]) for row in going}
        runner.step(batch | {"x": (stranger, 0, 3)})
        assert runner.said[-1] == greedy
        for row, token in zip(going, runner.said, strict=False):
            computed[row] = len(texts[row])
            texts[row].append(token)
    assert [ids[P:] for ids in texts] == tokens
    values = taken(hooks, key)
    np.testing.assert_allclose(values.reshape(3, -1, 12), sketches.astype(np.float32), atol=1e-3)
    assert hooks.rows.counts()["rows"] == 0
    assert hooks.rows.get(key).decodes == {}


@pytest.mark.parametrize("kind", [Runner, NewRunner])
@pytest.mark.parametrize("cut", [3, P - 1, P + 20, P + STEPS - 2])
def test_a_replay_has_margins_for_every_token_wherever_its_prompt_is_cut(kind, cut: int):
    runner, key = kind(), new_key()
    draws, tokens, sketches = defined(rounded=False)
    claimed = [list(row) for row in tokens]
    claimed[1][7], claimed[2][30] = (tokens[1][7] + 1) % V, V + 5
    given = [ids + [min(token, V - 1) for token in row[:-1]] for ids, row in zip(draws.prompts_BP.tolist(), claimed)]  # noqa: B905
    hooks = started(runner, key, {n: (i, c) for n, i, c in zip(NONCES, given, claimed, strict=True)})
    names = [f"{request_id(key, nonce)}-abcd" for nonce in NONCES]
    runner.step({name: (ids, 0, cut) for name, ids in zip(names, given, strict=True)})
    runner.step({name: (ids, cut, len(ids) - cut) for name, ids in zip(names, given, strict=True)})
    values = taken(hooks, key)
    sketched, margins = np.split(values, [24], axis=1)
    assert (margins[0] == 0).all()
    assert (margins[1, :7] == 0).all()
    assert margins[1, 7] > 0
    assert np.isinf(margins[2, 30])
    np.testing.assert_allclose(sketched[0].reshape(-1, 12), sketches[0].astype(np.float32), atol=1e-3)


def test_requests_of_another_length_or_with_embeddings_fail_alone():
    runner, key = Runner(), new_key()
    prompts = defined(rounded=False)[0].prompts_BP.tolist()
    short = {3: (prompts[0][:-1], None), 8: (prompts[1], [1] * STEPS), 20: (prompts[2], None)}
    hooks = started(runner, key, short)
    assert sorted(hooks.rows.get(key).failed) == [3, 8]
    assert list(hooks.rows.get(key).decodes) == [20]


@pytest.mark.parametrize(("config", "sharder", "reason"), [(1, None, "speculative"), (None, 1, "spread")])
def test_engines_without_one_row_of_logits_for_each_request_refuse_the_preset_by_name(config, sharder, reason):
    runner = Runner()
    runner.batch_sharder = sharder
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: D, get_vocab_size=lambda: V)
    hooks = Hooks(runner, SimpleNamespace(model_config=model, speculative_config=config))
    with pytest.raises(UsageError, match=reason):
        hooks.open(new_key(), SPEC)
    assert len(hooks.rows) == 0


def test_chat_waits_for_passes_so_that_more_nonces_may_decode(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("assay.poc.vllm.throttle.time.monotonic", lambda: now[0])
    limits = []
    for passes in (1, 64):
        throttle = Throttle(ThrottleSettings(wait=0.1), lambda: 0, 16)
        throttle.in_flight = 4
        now[0] = 1.0
        throttle.leave(passes)
        limits.append(throttle.limit)
    assert limits == [2, 6]
