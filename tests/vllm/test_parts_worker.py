"""What a worker holds of nonces: rows and their ids, the requests of a step, inputs, states and
decoded tokens.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay import streams
from assay.errors import UsageError
from assay.models.frame import Frame
from assay.poc import Round, get_pipeline
from assay.poc.engines.base import noise_inputs, token_inputs
from assay.poc.engines.hf.decoding import Draws
from assay.poc.protocol.pipelines import sketch_steps
from assay.poc.vllm import rows as _rows
from assay.poc.vllm.rows import CLAIMED, Chunk, Rows, Spec, new_key, request_id, spans, split_id
from assay.poc.vllm.throttle import Throttle, ThrottleSettings
from assay.poc.vllm.worker import Hooks, WorkerExtension
from tests.vllm.conftest import lay_out, settings_of_vllm, values_of

SPEC = Spec(Round(block_hash="b", public_key="k", seq_len=8), get_pipeline("poc-2.0"))
V = 40
D = 16
CPU = torch.device("cpu")
ONES = np.ones(D, np.float32)
FRAME = Frame(
    "0" * 64, "trained", rows=V, left_out=np.array([0], np.int32), mean=0 * ONES, scale=ONES
)


def hooks_on(runner, **config) -> Hooks:
    """Hooks on the stand-in of a model runner, of a model of width D and vocabulary V."""
    model = {
        "model.dtype": torch.float32,
        "model.get_hidden_size": lambda: D,
        "model.get_vocab_size": lambda: V,
    }
    return Hooks(runner, settings_of_vllm(model | config))


def test_a_request_id_leads_back_to_key_and_nonce_with_or_without_the_suffix_of_vllm():
    key = new_key()
    other = new_key()
    assert key != other
    assert len(key) >= 32 + len("assay-")  # it cannot be guessed
    for nonce in (0, 7, 2**53 - 1):
        assert split_id(request_id(key, nonce)) == (key, nonce)
        assert split_id(f"{request_id(key, nonce)}-0123abcd") == (key, nonce)


@given(st.text(max_size=60))
def test_other_request_ids_are_nobodys(text: str):
    found = split_id(text)
    assert found is None or (found[0].startswith("assay-") and found[1] >= 0)
    assert split_id(f"chatcmpl-{text}") is None


def rows_with(count: int) -> Rows:
    rows = Rows()
    rows.open("a", SPEC)
    for nonce in range(count):
        rows.get("a").fill(nonce)
        rows.get("a").put(nonce, torch.tensor([float(nonce)]))
    return rows


def test_rows_come_back_once_and_leave_nothing():
    rows = rows_with(3)
    found, states = rows.get("a").take([2, 0, 9])
    assert found == [2, 0]
    assert [state.item() for state in states] == [2.0, 0.0]
    assert rows.get("a").take([2])[0] == []
    rows.close("a")
    assert rows.counts() == {"streams": 0, "rows": 0, "filled": 0, "dropped": 1, "failed": 0}


def test_rows_that_nobody_collects_are_bounded():
    rows = rows_with(_rows.MAX_ROWS + 10)
    counts = rows.counts()
    assert counts["rows"] == counts["filled"] == _rows.MAX_ROWS
    assert counts["dropped"] == 10


def test_streams_that_nobody_closes_are_bounded_and_those_that_are_used_stay():
    rows = Rows()
    for number in range(_rows.MAX_STREAMS + 5):
        rows.open(str(number), SPEC)
        assert rows.get("0") is not None
    assert rows.counts()["streams"] == _rows.MAX_STREAMS
    assert rows.get("1") is None
    assert rows.get(str(_rows.MAX_STREAMS + 4)) is not None


@pytest.mark.parametrize(
    "state", [None, SimpleNamespace(hidden_states=None), SimpleNamespace(hidden_states={})]
)
def test_a_rank_without_states_has_no_spans(state):
    assert spans(SimpleNamespace(execute_model_state=state)) is None


def test_new_nonces_of_a_step_get_their_own_inputs_however_they_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("assay.poc.vllm.worker.MAX_VALUES", 2 * 8 * 16)  # two nonces at once
    monkeypatch.setattr("assay.poc.vllm.worker.is_first_stage", lambda: True)
    steps: list[object] = []
    runner = SimpleNamespace(device=CPU, execute_model=steps.append, sample_tokens=None)
    hooks = hooks_on(runner)
    other = Spec(Round(block_hash="other", public_key="k", seq_len=8), get_pipeline("poc-2.0"))
    keys = {new_key(): SPEC, new_key(): other}
    for key, spec in keys.items():
        hooks.rows.open(key, spec)
    wanted = [(key, nonce) for nonce in range(5) for key in keys]
    requests = [
        SimpleNamespace(
            req_id=request_id(key, nonce),
            prompt_embeds=None,
            prompt_token_ids=[0] * (8 - (nonce == 3)),
        )
        for key, nonce in wanted
    ]
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=requests))
    assert len(steps) == 1
    assert all(list(hooks.rows.get(key).failed) == [3] for key in keys)
    backend = streams.get_backend("auto", "cpu")
    for (key, nonce), request in zip(wanted, requests, strict=True):
        assert (nonce in hooks.rows.get(key).filled) == (nonce != 3)
        if nonce != 3:
            alone = noise_inputs(
                backend, keys[key].round.inputs([nonce]), seq_len=8, hidden_size=16, dtype="float32"
            )[0]
            assert torch.equal(request.prompt_embeds, alone)
            assert request.prompt_is_token_ids == [False] * 8


def test_nonces_of_a_frame_are_kept_only_where_their_prompts_are_their_own_tokens():
    runner = SimpleNamespace(device=CPU, execute_model=lambda _: None, sample_tokens=None)
    key = new_key()
    round = Round(block_hash="b", public_key="k", seq_len=8, preset="tokens-1")
    hooks = hooks_on(runner)
    spec = Spec(round, get_pipeline("tokens-1"), FRAME)
    hooks.rows.open(key, spec)
    own = token_inputs(round.inputs([1]), FRAME, seq_len=8)[0].tolist()
    sent = {1: (own, None), 2: (own, None), 3: ([0] * 8, torch.zeros(8, D))}
    named = [
        {"req_id": request_id(key, n), "prompt_token_ids": i, "prompt_embeds": e}
        for n, (i, e) in sent.items()
    ]
    runner.execute_model(
        SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(**request) for request in named])
    )
    assert list(hooks.rows.get(key).filled) == [1]
    assert hooks.rows.get(key).failed == {
        n: f"ValueError: other tokens than those of nonce {n}" for n in (2, 3)
    }


def test_a_stage_without_hidden_states_forgets_nonces_when_they_are_collected():
    hooks = hooks_on(SimpleNamespace(device=CPU, execute_model=None, sample_tokens=None))
    key = new_key()
    hooks.rows.open(key, SPEC)
    hooks.rows.get(key).fill(3)
    hooks.rows.get(key).fail(4, "too long")
    assert hooks.collect(key, [3, 4]) == {"failed": {"4": "too long"}}
    assert hooks.rows.counts() == {"streams": 1, "rows": 0, "filled": 0, "dropped": 0, "failed": 0}


@pytest.mark.parametrize("preset", ["hardened", "tokens-1"])
def test_chunks_of_a_step_are_summed_each_for_itself_however_they_are_grouped(
    preset: str, monkeypatch: pytest.MonkeyPatch
):
    """Three steps: whole prompts beside halves of others, in groups of two, with the states of a
    stranger between.
    """
    monkeypatch.setattr("assay.poc.vllm.worker.MAX_SUMMED", 2 * 8 * 16)
    runner = SimpleNamespace(device=CPU, execute_model=None, sample_tokens=lambda: None)
    hooks = hooks_on(runner)
    round = Round(block_hash="b", public_key="k", seq_len=8, preset=preset)
    key = new_key()
    spec = Spec(round, get_pipeline(preset), FRAME if preset == "tokens-1" else None)
    hooks.rows.open(key, spec)
    states_BTD = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(0))
    reading = hooks.transform(spec).reading(spec.round.inputs(range(5)), 8)
    steps = [[(0, 0, 8), (3, 0, 5), (1, 0, 8)], [(4, 0, 5), (2, 0, 8)], [(3, 5, 8), (4, 5, 8)]]
    for nonce in range(5):
        hooks.rows.get(key).fill(nonce)
    for step in steps:
        parts = [torch.full((3, 16), float("nan"))]
        start = 3
        # And a nonce of a stream that is not open, and one that was not filled.
        found = [Chunk(name, 0, 3, 0, 3) for name in ("stranger", request_id(new_key(), 0))]
        found.append(Chunk(request_id(key, 77), 0, 3, 0, 8))
        for nonce, begin, end in step:
            parts.append(states_BTD[nonce, begin:end])
            found.append(Chunk(request_id(key, nonce), start, end - begin, begin, 8))
            start += end - begin
        left = torch.cat(parts), SimpleNamespace(chunks=found.copy)
        monkeypatch.setattr("assay.poc.vllm.worker.spans", lambda _, left=left: left)
        runner.sample_tokens()
    assert (hooks.errors, hooks.rows.counts()["failed"]) == (0, 0)
    nonces, rows = hooks.rows.get(key).take(range(5))
    assert nonces == list(range(5))
    torch.testing.assert_close(torch.stack(rows), reading.sum(states_BTD), atol=1e-6, rtol=0)
    assert not hooks.rows.get(key).parts
    assert not hooks.rows.get(key).rows


P = 6
STEPS = 40
DECODING = Spec(
    Round(block_hash="b", public_key="k", seq_len=P, preset=f"decode-{STEPS}"),
    get_pipeline(f"decode-{STEPS}"),
)
EMBEDDING, HEAD = torch.randn(2, V, D, generator=torch.Generator().manual_seed(0))
NONCES = (3, 8, 20)


class Runner:
    """As much of the V1 runner as is used, with a model whose state forgets half of the past at
    every position.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.execute_model_state = None
        self.said = []
        self.model = SimpleNamespace(compute_logits=lambda states: states @ HEAD.T)

    def execute_model(self, scheduler_output) -> None:
        """Take new requests."""

    def sample_tokens(self) -> None:
        self.said = self.scores().argmax(dim=1).tolist()

    def scores(self) -> torch.Tensor:
        return self.execute_model_state.logits

    def step(self, batch: dict[str, tuple[list[int], int, int]]) -> None:
        """Run tokens ``ids[computed:computed + length]`` of every request; their states follow all
        ids before.
        """
        parts = [states_of(ids)[at : at + length] for ids, at, length in batch.values()]
        states = torch.cat(parts)
        lay_out(
            self, states, {name: (at, length) for name, (_, at, length) in batch.items()}, prompt=P
        )
        self.rows = states[self.execute_model_state.input_batch.query_start_loc_np[1:] - 1]
        self.execute_model_state = self.execute_model_state._replace(logits=self.first_logits())
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
    found = []
    state = torch.zeros(D)
    for token in ids:
        state = EMBEDDING[token] + state / 2
        found.append(state)
    return torch.stack(found)


def started(
    runner: Runner, key: str, requests: dict[int, tuple[list[int], list[int] | None]]
) -> Hooks:
    hooks = hooks_on(runner)
    hooks.open(key, DECODING)
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
    """Return the draws, the tokens and the sketches of the definition, from logits in bfloat16 or
    float32.
    """
    draws = Draws(
        DECODING.round.inputs(NONCES),
        DECODING.pipeline,
        seq_len=P,
        model=SimpleNamespace(vocab_size=V, device=torch.device("cpu")),
    )
    texts = [list(ids) for ids in draws.prompts.tolist()]
    states = []
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


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("assay.poc.vllm.worker.is_first_of_group", lambda: True)


@pytest.mark.parametrize("kind", [Runner, NewRunner])
def test_nonces_decode_the_tokens_of_the_definition_beside_a_stranger(kind):
    runner = kind()
    key = new_key()
    draws, tokens, sketches = defined(rounded=kind is Runner)
    prompts = draws.prompts.tolist()
    hooks = started(
        runner, key, {nonce: (ids, None) for nonce, ids in zip(NONCES, prompts, strict=True)}
    )
    names = [f"{request_id(key, nonce)}-abcd" for nonce in NONCES]
    stranger = [1, 2, 3]
    # The first prompt comes in two chunks; the second begins a step later, and the third is alone
    # at the end.
    runner.step({"x": (stranger, 0, 3), names[0]: (prompts[0], 0, 4)})
    greedy = int((states_of(stranger)[-1] @ HEAD.T).argmax())
    assert runner.said[0] == greedy
    texts = [list(ids) for ids in prompts]
    computed = [4, 0, 0]
    for _ in range(STEPS + 2):
        going = [row for row in range(3) if len(texts[row]) < P + STEPS]
        batch = {
            names[row]: (texts[row], computed[row], len(texts[row]) - computed[row])
            for row in going
        }
        runner.step(batch | {"x": (stranger, 0, 3)})
        assert runner.said[-1] == greedy
        for row, token in zip(going, runner.said, strict=False):
            computed[row] = len(texts[row])
            texts[row].append(token)
    assert [ids[P:] for ids in texts] == tokens
    values = values_of(hooks, key, NONCES)
    np.testing.assert_allclose(values.reshape(3, -1, 12), sketches.astype(np.float32), atol=1e-3)
    assert hooks.rows.counts()["rows"] == 0
    assert hooks.rows.get(key).decodes == {}


@pytest.mark.parametrize("kind", [Runner, NewRunner])
@pytest.mark.parametrize("cut", [3, P - 1, P + 20, P + STEPS - 2])
def test_a_replay_has_margins_for_every_token_wherever_its_prompt_is_cut(kind, cut: int):
    runner = kind()
    key = new_key()
    draws, tokens, sketches = defined(rounded=False)
    claimed = [list(row) for row in tokens]
    claimed[1][7], claimed[2][30] = (tokens[1][7] + 1) % V, V + 5
    given = [
        ids + [min(token, V - 1) for token in row[:-1]]
        for ids, row in zip(draws.prompts.tolist(), claimed, strict=False)
    ]
    hooks = started(
        runner, key, {n: (i, c) for n, i, c in zip(NONCES, given, claimed, strict=True)}
    )
    names = [f"{request_id(key, nonce)}-abcd" for nonce in NONCES]
    runner.step({name: (ids, 0, cut) for name, ids in zip(names, given, strict=True)})
    runner.step({name: (ids, cut, len(ids) - cut) for name, ids in zip(names, given, strict=True)})
    values = values_of(hooks, key, NONCES)
    sketched, margins = np.split(values, [24], axis=1)
    assert (margins[0] == 0).all()
    assert (margins[1, :7] == 0).all()
    assert margins[1, 7] > 0
    assert np.isinf(margins[2, 30])
    np.testing.assert_allclose(
        sketched[0].reshape(-1, 12), sketches[0].astype(np.float32), atol=1e-3
    )


def test_requests_of_another_length_or_with_embeddings_fail_alone():
    runner = Runner()
    key = new_key()
    prompts = defined(rounded=False)[0].prompts.tolist()
    short = {3: (prompts[0][:-1], None), 8: (prompts[1], [1] * STEPS), 20: (prompts[2], None)}
    hooks = started(runner, key, short)
    assert sorted(hooks.rows.get(key).failed) == [3, 8]
    assert list(hooks.rows.get(key).decodes) == [20]


@pytest.mark.parametrize(
    ("config", "sharder", "reason"), [(1, None, "speculative"), (None, 1, "spread")]
)
def test_engines_without_one_row_of_logits_for_each_request_refuse_the_preset_by_name(
    config, sharder, reason
):
    runner = Runner()
    runner.batch_sharder = sharder
    hooks = hooks_on(runner, speculative_config=config)
    with pytest.raises(UsageError, match=reason):
        hooks.open(new_key(), DECODING)
    assert len(hooks.rows) == 0


@pytest.mark.parametrize(
    ("given", "preset", "refusal"),
    [
        ({}, "poc-2.0", "poc-2.0 without --enable-prompt-embeds"),
        ({}, "no-preset", "no-preset"),
        ({"seq_len": 0}, f"decode-{STEPS}", "seq_len"),
        ({}, f"decode-{STEPS}", None),
    ],
)
def test_a_worker_says_why_it_refuses_a_round(given: dict, preset: str, refusal: str | None):
    worker = WorkerExtension()
    worker.vllm_config = settings_of_vllm({"model.enable_prompt_embeds": False})
    worker.assay_hooks = hooks_on(Runner())
    said = worker.assay_open(
        "key",
        {"block_hash": "b", "public_key": "k", "seq_len": P, "preset": preset} | given,
        preset,
    )
    assert refusal in said if refusal else said is None
    assert len(worker.assay_hooks.rows) == (refusal is None)


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
