"""Chains of nonces in a worker: inputs in place of tokens, reflections of their rows alone, points
and margins.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from assay import streams
from assay.errors import UsageError
from assay.poc import Round, get_pipeline
from assay.poc.engines.base import noise_inputs
from assay.poc.protocol.sphere import Chain
from assay.poc.protocol.transforms import reflect
from assay.poc.vllm.rows import CLAIMED, Spec, new_key, request_id
from assay.poc.vllm.worker import Hooks
from tests.vllm.conftest import State, settings_of_vllm, values_of

P = 6
N = 7
D = 256
SPEC = Spec(
    Round(block_hash="b", public_key="k", seq_len=P, preset=f"chain-decode-{N}"),
    get_pipeline(f"chain-decode-{N}"),
)
NONCES = (3, 8)
CHAT = torch.randn(P + N, D, generator=torch.Generator().manual_seed(5))


class Layer(nn.Module):
    """A layer as vLLM has it: it returns what it adds, and the sum so far."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(D, D, generator=torch.Generator().manual_seed(seed)) / 16
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x, rest):
        rest = x if rest is None else x + rest
        return torch.tanh(rest @ self.weight), rest


class Runner:
    """As much of the V1 runner as is used; a state forgets half of the past at every position."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.execute_model_state = None
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(1), Layer(2)])
        self.last = {}

    def execute_model(self, scheduler_output) -> None:
        """Take new requests."""

    def sample_tokens(self) -> None:
        """Sample what no reader asks for."""

    def _model_forward(self, inputs_embeds=None):
        x, rest = inputs_embeds, None
        for layer in self.model.layers:
            x, rest = layer(x, rest)
        return x + rest

    def step(self, batch, new=()) -> None:
        """Run ``embeddings[computed:computed + length]`` of every request."""
        lengths = {name: length for name, (_, _, length) in batch.items()}
        self.input_batch = SimpleNamespace(
            req_ids=list(batch),
            num_computed_tokens_cpu=np.array([at for _, at, _ in batch.values()]),
            num_prompt_tokens=np.array([P] * len(batch)),
        )
        scheduled = SimpleNamespace(scheduled_new_reqs=list(new), num_scheduled_tokens=lengths)
        self.execute_model(scheduled)
        parts = [given()[at : at + length].clone() for given, at, length in batch.values()]
        rows = self._model_forward(inputs_embeds=torch.cat(parts))
        states = []
        for name, part in zip(batch, rows.split(list(lengths.values())), strict=True):
            for row in part:
                self.last[name] = row + self.last.get(name, 0) / 2
                states.append(self.last[name])
        self.execute_model_state = State(scheduled, None, torch.stack(states), None)
        self.sample_tokens()
        self.execute_model_state = None


def hooks_on(runner, **changed) -> Hooks:
    settings = {
        "model.dtype": torch.float32,
        "model.get_hidden_size": lambda: D,
        "model.get_vocab_size": lambda: 40,
        "model.enforce_eager": True,
        "model.enable_prompt_embeds": True,
        "model.is_moe": False,
        "model.hf_text_config": SimpleNamespace(num_hidden_layers=2),
        "parallel.pipeline_parallel_size": 1,
        "speculative_config": None,
    }
    return Hooks(runner, settings_of_vllm(settings | changed))


def defined(claimed=None):
    """Return points and margins [2, N + 1] of the definition, one nonce after the other."""
    layers = [Layer(1), Layer(2)]
    vectors = []
    backend = streams.get_backend("auto", "cpu")
    for number in range(2):
        seeds = streams.seeds([SPEC.round.block_text("layer_reflection", number)])
        normals = torch.as_tensor(backend.normals(seeds, D))[0]
        vectors.append(normals / normals.norm())
    found = []
    for row, nonce in enumerate(NONCES):
        inputs = SPEC.round.inputs([nonce])
        chain = Chain(inputs, hidden_size=D, device=torch.device("cpu"), dtype=torch.float32)
        given = noise_inputs(backend, inputs, seq_len=P, hidden_size=D, dtype="float32")[0]
        state, points, margins = torch.zeros(D), [], []
        previous = np.zeros((1, 1), np.uint8)
        for step in range(N + 1):
            if step:
                given = chain.embeddings(previous, step)[0]
            for x in given:
                for layer, v in zip(layers, vectors, strict=True):
                    added, rest = layer(x, None)
                    x = reflect(added + rest, v)
                state = x + state / 2
            scores = chain.scores(state.view(1, 1, D), previous, step)[0, 0]
            points.append(int(scores.argmax()))
            previous = np.array([[points[-1] if claimed is None else claimed[row][step]]], np.uint8)
            margins.append(float(scores.max() - scores[int(previous[0, 0])]))
        found.append((points, margins))
    return np.array([one for one, _ in found]), np.array([two for _, two in found])


def requests(key, claimed=None):
    length = P if claimed is None else P + N
    return {
        f"{request_id(key, nonce)}-abcd": SimpleNamespace(
            req_id=f"{request_id(key, nonce)}-abcd",
            prompt_embeds=None,
            prompt_token_ids=[0] * length,
            sampling_params=SimpleNamespace(
                extra_args=None if claimed is None else {CLAIMED: claimed[row]}
            ),
        )
        for row, nonce in enumerate(NONCES)
    }


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("assay.poc.vllm.worker.is_first_of_group", lambda: True)
    monkeypatch.setattr("assay.poc.vllm.worker.is_first_stage", lambda: True)


def embeddings_of(request):
    """Return what vLLM reads of a request: its inputs, and embeddings of sampled tokens behind."""
    return lambda: torch.cat([request.prompt_embeds, torch.ones(N + 1, D)])


def test_chains_run_in_chunks_beside_chat_that_is_not_reflected():
    runner = Runner()
    alone = Runner()
    key = new_key()
    hooks = hooks_on(runner)
    hooks.open(key, SPEC)
    new = requests(key)
    first, second = ((name, embeddings_of(new[name])) for name in new)
    chat = ("chatcmpl-1", lambda: CHAT)
    runner.step({first[0]: (first[1], 0, 4), chat[0]: (chat[1], 0, 2)}, new.values())
    runner.step({first[0]: (first[1], 4, 2), second[0]: (second[1], 0, P)})
    for at in range(P, P + N):
        batch = {second[0]: (second[1], at, 1), chat[0]: (chat[1], at - 4, 1)}
        runner.step(batch | {first[0]: (first[1], at, 1)})
    points, _ = defined()
    np.testing.assert_array_equal(values_of(hooks, key, NONCES), points)
    alone.step({chat[0]: (chat[1], 0, N + 2)})
    torch.testing.assert_close(runner.last[chat[0]], alone.last[chat[0]])


@pytest.mark.parametrize(
    ("cut", "again"), [(P + N, False), (P - 1, False), (P + 3, False), (P + 3, True)]
)
def test_a_replay_follows_the_claim_in_one_prompt_or_in_parts(cut: int, again: bool):
    """Preempted after its first part, a prompt runs from its start again."""
    claimed = np.random.default_rng(0).integers(0, 16, (2, N + 1)).tolist()
    runner = Runner()
    key = new_key()
    hooks = hooks_on(runner)
    hooks.open(key, SPEC)
    new = requests(key, claimed)
    rows = {name: embeddings_of(request) for name, request in new.items()}
    runner.step({name: (given, 0, cut) for name, given in rows.items()}, new.values())
    if again:
        runner.last.clear()
        runner.step({name: (given, 0, cut) for name, given in rows.items()})
    if cut < P + N:
        runner.step({name: (given, cut, P + N - cut) for name, given in rows.items()})
    _, margins = defined(claimed)
    np.testing.assert_allclose(values_of(hooks, key, NONCES), margins, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model.enforce_eager": False}, "enforce-eager"),
        ({"model.enable_prompt_embeds": False}, "enable-prompt-embeds"),
        ({"parallel.pipeline_parallel_size": 2}, "stages"),
        ({"model.is_moe": True}, "mixture"),
    ],
)
def test_an_engine_that_cannot_reflect_rows_is_refused(changed, words: str):
    hooks = hooks_on(Runner(), **changed)
    with pytest.raises(UsageError, match=words):
        hooks.open(new_key(), SPEC)
