"""Parameters of sampling; and scores with the bits of the definition, whose draws are those of
ordinary sampling.
"""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from assay.errors import UsageError
from assay.poc.responses import ResponseSeed, Sampling
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.sampling import counts_before, mark_tokens
from tests.poc.responses.vectors import scores
from tests.usual import usual
from tests.wordings import refuses

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
SETTINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "hot": Sampling(temperature=1.9, top_k=3),
    "top-k": Sampling(top_k=7),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.1, temperature=1.3),
    "all filters": Sampling(temperature=0.8, top_k=12, top_p=0.95, min_p=0.02),
    "penalties": Sampling(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.7, temperature=0.9),
    "everything": Sampling(
        temperature=0.9, top_k=15, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3,
        presence_penalty=0.2, logit_bias={2: 1.5, 5: -3.0},
    ),
    "greedy": Sampling(temperature=0, repetition_penalty=1.5, logit_bias={1: 2.0}),
}  # fmt: skip
PROMPT = [1, 4, 4, 9]
OUTPUT = [9, 2, 2, 0]
VOCABULARY = 24
SEED = ResponseSeed(user_seed="u", request_id="r", public_key="K", digest="0" * 64, block_hash="B")


def logits(rows: int, size: int, seed: int = 3) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(0, 2.5, (rows, size)).astype(np.float32)
    drawn[:, ::7] = np.round(drawn[:, ::7])  # some ties
    drawn[:, 11] = -np.inf
    return drawn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_are_those_of_the_definition(name: str, device: str):
    for size in (VOCABULARY, 4099):
        raw = logits(40, size)
        seeds = SEED.step_seeds(range(40))
        prompt = mark_tokens(PROMPT, size)
        counts = np.tile(counts_before(OUTPUT, size, 4, 5), (40, 1))
        wanted = scores(raw, SETTINGS[name], seeds, prompt_V=prompt, counts_NV=counts)
        history = {
            "prompt_NV": torch.from_numpy(prompt).to(device),
            "counts_NV": torch.from_numpy(counts).to(device),
        }
        sampler = Sampler([SETTINGS[name]], size, device)
        found = sampler.scores(torch.from_numpy(raw).to(device), seeds, **history)
        np.testing.assert_array_equal(found.cpu().numpy(), wanted)
        assert found.argmax(dim=1).tolist() == wanted.argmax(axis=1).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_may_have_parameters_of_its_own(device: str):
    rows = list(SETTINGS.values()) * 3
    raw = logits(len(rows), 1031)
    seeds = SEED.step_seeds(range(len(rows)))
    found = (
        Sampler(rows, 1031, device).scores(torch.from_numpy(raw).to(device), seeds).cpu().numpy()
    )
    for row, sampling in enumerate(rows):
        np.testing.assert_array_equal(
            found[row], scores(raw[row], sampling, seeds[row : row + 1])[0]
        )


def test_history_may_differ_by_row():
    output = [3, 3, 7, 3, 1, 0, 7]
    raw = logits(8, VOCABULARY)
    seeds = SEED.step_seeds(range(8))
    counts = counts_before(output, VOCABULARY, 0, 8)
    prompt = mark_tokens(PROMPT, VOCABULARY)
    sampling = SETTINGS["penalties"]
    found = Sampler([sampling], VOCABULARY, "cpu").scores(
        torch.from_numpy(raw),
        seeds,
        prompt_NV=torch.from_numpy(prompt),
        counts_NV=torch.from_numpy(counts),
    )
    np.testing.assert_array_equal(
        found.numpy(), scores(raw, sampling, seeds, prompt_V=prompt, counts_NV=counts)
    )


def test_the_logits_are_left_alone():
    raw = torch.from_numpy(logits(len(SETTINGS), VOCABULARY))
    before = raw.clone()
    Sampler(list(SETTINGS.values()), VOCABULARY, "cpu").scores(
        raw, SEED.step_seeds(range(len(SETTINGS)))
    )
    assert torch.equal(raw, before)


@pytest.mark.parametrize(
    "names", [("plain",), ("temperature",), ("all filters",), ("plain", "greedy"), ("greedy",)]
)
def test_scores_in_the_place_of_the_logits_are_the_same(names: tuple[str, ...]):
    sampler = Sampler([SETTINGS[name] for name in names], VOCABULARY, "cpu")
    raw = torch.from_numpy(logits(len(names), VOCABULARY))
    seeds = SEED.step_seeds(range(len(names)))
    assert torch.equal(
        sampler.add_noise(raw.clone(), seeds, in_place=True), sampler.add_noise(raw, seeds)
    )


def expected(raw: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by the textbook, in float64 and token by token: no code of the definition is
    used.
    """
    values = {token: float(value) for token, value in enumerate(raw) if value > -np.inf}
    for token in values:
        values[token] += sampling.logit_bias.get(token, 0.0)
        if token in PROMPT or token in OUTPUT:
            positive = values[token] > 0
            values[token] *= (
                1 / sampling.repetition_penalty if positive else sampling.repetition_penalty
            )
        values[token] -= sampling.frequency_penalty * OUTPUT.count(token)
        values[token] -= sampling.presence_penalty * (token in OUTPUT)
    weights = {
        token: float(np.exp(value / sampling.temperature)) for token, value in values.items()
    }
    weights = {
        token: w for token, w in weights.items() if w >= sampling.min_p * max(weights.values())
    }
    ordered = sorted(weights, key=lambda token: (-weights[token], token))
    if sampling.top_k:
        least = weights[ordered[min(sampling.top_k, len(ordered)) - 1]]
        ordered = [token for token in ordered if weights[token] >= least]
    total = sum(weights[token] for token in ordered)
    taken = 0.0
    chosen = []
    for token in ordered:
        if chosen and taken >= sampling.top_p * total:
            break
        taken += weights[token]
        chosen.append(token)
    probabilities = np.zeros(len(raw))
    probabilities[chosen] = [weights[token] / taken for token in chosen]
    return probabilities


def draws(sampling: Sampling, count: int = 10**6) -> tuple[np.ndarray, np.ndarray]:
    """How often each token is drawn in so many steps with the same logits, and those logits."""
    raw = np.random.default_rng(5).normal(0, 1.2, VOCABULARY).astype(np.float32)
    raw[11] = -np.inf
    sampler = Sampler([sampling], VOCABULARY, "cpu")
    prompt = torch.from_numpy(mark_tokens(PROMPT, VOCABULARY))
    counts = torch.from_numpy(counts_before(OUTPUT, VOCABULARY, 4, 5))
    rows = torch.from_numpy(raw).expand(50_000, -1)
    drawn = torch.zeros(VOCABULARY, dtype=torch.int64)
    for start in range(0, count, len(rows)):
        seeds = SEED.step_seeds(range(start, start + len(rows)))
        tokens = sampler.scores(rows, seeds, prompt_NV=prompt, counts_NV=counts).argmax(dim=1)
        drawn += torch.bincount(tokens, minlength=VOCABULARY)
    return drawn.numpy(), raw


def p_value(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    possible = probabilities > 0
    assert drawn[~possible].sum() == 0
    return float(stats.chisquare(drawn[possible], probabilities[possible] * drawn.sum()).pvalue)


@pytest.mark.parametrize(
    "name",
    usual(("temperature", "hot", "top-p", "min-p", "penalties", "everything"), "hot"),
)
def test_a_million_draws_are_those_of_ordinary_sampling(name: str):
    drawn, raw = draws(SETTINGS[name])
    assert drawn.sum() == 10**6
    assert p_value(drawn, expected(raw, SETTINGS[name])) > 1e-3


@pytest.mark.slow
def test_a_million_draws_would_show_another_temperature():
    drawn, raw = draws(Sampling())
    assert p_value(drawn, expected(raw, Sampling(temperature=1.01))) < 1e-6


def test_shapes_that_do_not_fit_are_refused():
    sampler = Sampler([Sampling(), Sampling()], VOCABULARY, "cpu")
    with refuses(UsageError, "shapes that do not fit are refused"):
        sampler.scores(torch.zeros((2, VOCABULARY)), SEED.step_seeds(range(3)))
    with refuses(UsageError, "shapes that do not fit are refused, 2"):
        sampler.scores(torch.zeros((3, VOCABULARY)), SEED.step_seeds(range(3)))
    with refuses(UsageError, "shapes that do not fit are refused, 3"):
        Sampler([Sampling(logit_bias={24: 1.0})], VOCABULARY, "cpu")


def test_counts_are_of_the_tokens_before():
    output = [3, 3, 1, 3, 0]
    found = counts_before(output, 4, 1, 5)
    assert found.tolist() == [np.bincount(output[:t], minlength=4).tolist() for t in range(1, 5)]
    assert counts_before(output, 4, 0, 1).tolist() == [[0, 0, 0, 0]]
    assert counts_before([], 4, 0, 0).shape == (0, 4)


def test_parameters_are_plain_numbers_in_one_form():
    sampling = Sampling(temperature=1, frequency_penalty=-0.0, logit_bias={7: 1, 3: -2})
    assert isinstance(sampling.temperature, float)
    assert str(sampling.frequency_penalty) == "0.0"
    assert list(sampling.as_dict()["logit_bias"].items()) == [("3", -2.0), ("7", 1.0)]
    assert sampling == Sampling(logit_bias={3: -2.0, 7: 1.0})
    assert hash(sampling) == hash(Sampling(logit_bias={3: -2.0, 7: 1.0}))
    assert pickle.loads(pickle.dumps(sampling)) == sampling


OUT_OF_RANGE = {
    "temperature": (-0.1, 0.005, math.nan, math.inf, "1", True, 10**400),
    "top_k": (-1, 1.0, 2**24 + 1),
    "top_p": (0.0, 1.01),
    "min_p": (-0.1, 1.1),
    "repetition_penalty": (0.0,),
    "frequency_penalty": (2.1,),
    "presence_penalty": (-2.1,),
    "logit_bias": (
        *({token: 1.0} for token in (-1, 2**24, "3")), {3: 101.0}, {3: math.nan}, [(3, 1.0)],
        dict.fromkeys(range(1025), 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]]
)
def test_parameters_out_of_range_are_refused(name: str, value: object):
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})
