"""Replay: a prefill finds the tokens of an honest node, and other weights; pins name what
differs.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.errors import CalibrationError, ProofMismatch, UsageError
from assay.models import Model, load_model
from assay.poc import Fingerprint, Pins, cheats
from assay.poc.responses import (
    HFPrefill,
    Prompt,
    Receipt,
    ReceiptPins,
    Receipts,
    Request,
    ResponseCalibration,
    Sampling,
    calibrate_responses,
    judge_responses,
    replay,
    respond,
)
from assay.poc.responses.replaying import compute_gaps, measure_margins
from assay.poc.responses.response_calibration import (
    LEAST_BETWEEN,
    SKETCH_TAIL,
    bundled_response_noise,
    check_enough_tokens,
    check_one_checkpoint,
    fair_sketches,
)
from assay.poc.responses.response_verdict import noise_between, sample_receipts
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.token_fit import fit_token_noise
from assay.poc.verdict.response_noise import PartNoise
from assay.stats import ClusterTest
from assay.stats.noise_laws import Spread, fit_log_noise
from assay.stats.token_law import COLUMNS, SCALES
from tests.laws import QWEN3
from tests.poc.responses.conftest import REQUESTS
from tests.poc.service.receipts import header as make_header
from tests.stats.tokens import drawn, law_at, token_profile
from tests.wordings import refuses

KNOWN = Pins(block_hash="block_alpha", public_key="node_A")


class Refused:
    """An engine that must not run."""

    def run(self, *given: object) -> None:
        raise AssertionError


def rebuilt(receipts: Receipts, *changed: Receipt) -> Receipts:
    """The file with other receipts in place of the first ones."""
    return Receipts.build(receipts.header, [*changed, *receipts.receipts[len(changed) :]], 1.0)


def test_the_tokens_of_an_honest_node_are_the_verifiers_own(
    responses: Receipts, small_model: Model
):
    seen: list[tuple[int, int]] = []
    found = replay(responses, small_model, progress=lambda done, total: seen.append((done, total)))
    assert [one.receipt for one in found] == list(responses.receipts)
    assert all(one.matches == len(one.receipt.output) for one in found)
    assert max(one.residuals.max() for one in found) < 1e-3
    assert [len(one.residuals) for one in found] == [2, 2, 1, 1]
    assert seen == [(count, 4) for count in range(1, 5)]


def test_another_token_has_a_margin_and_a_profile_that_says_so(
    responses: Receipts, small_model: Model
):
    first = responses.receipts[0]
    other = (first.output[0] + 1) % small_model.vocab_size
    found = replay(
        rebuilt(responses, replace(first, output=(other, *first.output[1:]))), small_model
    )[0]
    assert found.margins[0] > 0.01
    assert found.profiles[0, 0] < -100
    assert found.profiles[0, -1] == pytest.approx(-math.log(small_model.vocab_size), rel=1e-3)


def test_without_seeds_or_with_a_mask_sketches_are_all_there_is(
    responses: Receipts, small_model: Model
):
    first, second, *_ = responses.receipts
    found = replay(
        rebuilt(responses, replace(first, sampling=None), replace(second, mask=True)), small_model
    )
    assert [len(one.margins) for one in found[:2]] == [0, 0]
    assert [len(one.blocks) for one in found[:2]] == [2, 2]
    assert max(one.residuals.max() for one in found[:2]) < 1e-3


def test_hashed_prompts_need_the_requests(responses: Receipts, small_model: Model):
    hidden = Receipts.build(
        responses.header, [one.without_prompt() for one in responses.receipts], 1.0
    )
    with refuses(ProofMismatch, "hashed prompts need the requests"):
        replay(hidden, small_model)
    found = replay(hidden, small_model, requests=REQUESTS)
    assert all(one.matches == len(one.receipt.output) for one in found)


def test_receipts_of_another_model_or_vocabulary_are_refused(
    responses: Receipts, small_model: Model
):
    with refuses(ProofMismatch, "receipts of another model or vocabulary are refused"):
        replay(responses, replace(small_model, digest="0" * 64))
    first = replace(
        responses.receipts[0],
        output=(small_model.vocab_size,),
        sketches=responses.receipts[0].sketches[:1],
    )
    with refuses(ProofMismatch, "receipts of another model or vocabulary are refused, 2"):
        replay(rebuilt(responses, first), small_model)


@pytest.mark.parametrize("odd", ["bias", "prompt"])
def test_a_token_outside_the_vocabulary_is_refused_before_any_prefill(
    responses: Receipts, small_model: Model, odd: str
):
    biased = Sampling(logit_bias={small_model.vocab_size: 1.0})
    prompt = Prompt.of([small_model.vocab_size])
    first = responses.receipts[0]
    hidden = replace(first, prompt=prompt).without_prompt()
    receipts = rebuilt(responses, replace(first, sampling=biased) if odd == "bias" else hidden)
    with pytest.raises(ProofMismatch, match=f"token {small_model.vocab_size}"):
        replay(
            receipts,
            small_model,
            requests=[replace(REQUESTS[0], prompt=prompt.ids)],
            engine=Refused(),
        )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(top_k=5, min_p=0.02, top_p=0.8, temperature=1.3),
    ],
)
def test_the_verifiers_own_token_has_no_gap_and_the_profile_is_the_definition(sampling: Sampling):
    rng = np.random.default_rng(3)
    logits = torch.tensor(rng.normal(0, 2, (40, 300)), dtype=torch.float32)
    seeds = rng.integers(0, 2**32, 40, dtype=np.uint32)
    scores = Sampler([sampling] * 40, 300, "cpu").add_noise(logits, seeds)
    gaps = compute_gaps(logits, scores, sampling, seeds)
    own = scores.argmax(dim=1)
    assert float(gaps.gather(1, own[:, None]).abs().max()) == 0
    assert bool((gaps >= 0).all())
    if sampling == Sampling():
        assert torch.allclose(gaps.float(), scores.amax(dim=1, keepdim=True) - scores)
    tokens = torch.where(torch.arange(40) < 20, own, torch.tensor(rng.integers(0, 300, 40)))
    margins, profiles = measure_margins(logits, tuple(tokens.tolist()), sampling, seeds)
    wanted = token_profile(gaps.numpy(), tokens.numpy())
    assert profiles == pytest.approx(wanted, rel=2e-3, abs=1e-3)
    assert np.array_equal(margins[:20], np.zeros(20))


def test_a_penalty_that_a_client_asks_for_makes_honest_noise_no_larger():
    rng = np.random.default_rng(3)
    sampling = Sampling(repetition_penalty=0.01)
    prompt = tuple(range(300))
    logits, noise = (
        torch.tensor(rng.normal(0, size, (200, 300)), dtype=torch.float32) for size in (2, 0.01)
    )
    seeds = np.arange(200, dtype=np.uint32)
    sampler = Sampler([sampling] * 200, 300, "cpu")
    whole = {"prompt_NV": torch.ones(300, dtype=torch.bool), "counts_NV": torch.zeros(200, 300)}
    tokens = sampler.add_noise(sampler.penalise(logits + noise, **whole), seeds).argmax(dim=1)
    margins, profiles = measure_margins(
        logits, tuple(tokens.tolist()), sampling, seeds, prompt=prompt
    )
    assert margins.max() > 0
    assert profiles[:, 12].min() > -10


class Likeliest(HFPrefill):
    """Gives the largest logits and that of the claimed token, as vLLM does."""

    def run(self, responses, adapter=None):
        for place, found in super().run(responses, adapter):
            border_N = found.logits.topk(64).values[:, -1:]
            given_NV = found.logits >= border_N
            given_NV[torch.arange(len(given_NV)), torch.tensor(responses[place].output)] = True
            yield (
                place,
                replace(found, logits=torch.where(given_NV, found.logits, -torch.inf), whole=False),
            )


@pytest.mark.parametrize(
    ("sampling", "refused"),
    [
        (Sampling(temperature=2.0, top_p=0.95), True),
        (Sampling(temperature=2.0, top_p=0.95, top_k=20), False),
        (Sampling(temperature=1.0, top_p=0.95, min_p=0.9), False),
        (Sampling(temperature=2.0), False),
        (Sampling(temperature=0), False),
    ],
)
def test_top_p_is_not_judged_by_a_part_of_the_logits(
    small_model: Model, sampling: Sampling, refused: bool
):
    """Of fewer logits it keeps fewer tokens, and those that an honest node took beyond them would
    look impossible.
    """
    request = Request(prompt=(5, 9, 12), request_id="r", max_tokens=32, sampling=sampling)
    receipts = respond(small_model, [request], block_hash="b", public_key="k", end_tokens=())
    engine = Likeliest(small_model)
    if refused:
        with refuses(UsageError, "top p is not judged by a part of the logits"):
            replay(receipts, small_model, engine=engine)
        return
    (found,) = replay(receipts, small_model, engine=engine)
    assert np.isfinite(found.margins[found.margins < 1e30]).all()
    assert found.matches >= 31


@pytest.mark.parametrize("batch_size", [-1, 0])
def test_a_batch_has_one_response_at_least(small_model: Model, batch_size: int):
    with refuses(UsageError, "a batch has one response at least"):
        HFPrefill(small_model, batch_size=batch_size)


def test_stop_texts_are_not_looked_for_without_a_tokenizer(small_model: Model):
    request = Request(prompt=(5, 9), request_id="r", max_tokens=20)
    receipts = respond(small_model, [request], block_hash="b", public_key="k", end_tokens=())
    with refuses(UsageError, "stop texts are not looked for without a tokenizer"):
        replay(receipts, small_model, requests=[replace(request, stop=("x",))])


@pytest.mark.parametrize(
    ("seed", "gaps"),
    [(0, (0.001, 0.0, 0.001)), (1, (0.001, 0.0, 0.2055)), (2, (0.0, 1.001, 0.6283))],
)
def test_the_border_of_the_support_is_soft(seed: int, gaps: tuple[float, ...]):
    """The third token is outside by .001 of a logit: it can enter, and the second one can leave."""
    sampling = Sampling(top_k=2)
    logits = torch.tensor([[3.0, 2.0, 1.999, -5.0]])
    seeds = np.array([seed], dtype=np.uint32)
    scores = Sampler([sampling], 4, "cpu").add_noise(logits, seeds)
    found = compute_gaps(logits, scores, sampling, seeds)[0].tolist()
    assert found[:3] == pytest.approx(gaps, abs=1e-3)
    assert found[3] == pytest.approx(7.0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"request_id": "other"}, "request_id"),
        ({"user_seed": "mine"}, "user_seed"),
        ({"index": 4}, "index"),
        ({"chosen_by": "server"}, "chosen_by"),
        ({"block_hash": "block_beta"}, "block_hash"),
        ({"sampling": Sampling(temperature=0.5)}, "temperature"),
        ({"prompt": Prompt.of([1, 2, 3])}, "prompt"),
        ({"finish": "length", "output": (1, 2), "sketches": "first"}, "tokens"),
    ],
)
def test_an_answer_to_another_request_fails_by_name(
    responses: Receipts, change: dict[str, object], name: str
):
    first = responses.receipts[0]
    if "sketches" in change:
        change = change | {"sketches": first.sketches[:1]}
    pins = ReceiptPins(known=KNOWN, requests=REQUESTS)
    pins.check(responses)
    with pytest.raises(ProofMismatch, match=name):
        pins.check(rebuilt(responses, replace(first, **change)))


def test_filters_that_a_server_sets_back_at_temperature_0_make_no_other_request(
    responses: Receipts,
):
    filtered = Sampling(temperature=0, top_k=20, top_p=0.9, min_p=0.1)
    requests = [replace(one, sampling=filtered) if one.sampling.greedy else one for one in REQUESTS]
    ReceiptPins(known=KNOWN, requests=requests).check(responses)
    drawn = replace(requests[-1], sampling=replace(filtered, temperature=1.0))
    pins = ReceiptPins(known=KNOWN, requests=[*requests[:-1], drawn])
    with refuses(
        ProofMismatch, "filters that a server sets back at temperature 0 make no other request"
    ):
        pins.check(responses)


@pytest.mark.parametrize(
    "pins", [{"public_key": "node_B"}, {"digest": "0" * 64}, {"prover_dtype": "bfloat16"}]
)
def test_another_key_model_or_format_fails_by_name(responses: Receipts, pins: dict[str, str]):
    with pytest.raises(
        ProofMismatch, match="made in" if "prover_dtype" in pins else next(iter(pins))
    ):
        ReceiptPins(known=replace(KNOWN, **pins)).check(responses)


def test_what_is_taken_on_the_nodes_word_is_listed(responses: Receipts):
    assert ReceiptPins(known=KNOWN, requests=REQUESTS).unpinned(responses) == ()
    assert ReceiptPins().unpinned(responses) == ("block_hash", "public_key", "requests")
    texts = tuple(replace(one, prompt="a text, which no receipt holds") for one in REQUESTS)
    assert ReceiptPins(known=KNOWN, requests=texts).unpinned(responses) == ("requests",)
    unseeded = rebuilt(responses, replace(responses.receipts[0], sampling=None))
    pins = ReceiptPins(known=KNOWN, requests=REQUESTS)
    assert pins.unpinned(unseeded) == ("tokens",)
    assert replace(pins, evidence="sketches").unpinned(unseeded) == ()
    bare = replace(responses, header=replace(responses.header, sketched=False))
    assert pins.unpinned(bare) == ("sketches",)
    assert replace(pins, evidence="tokens").unpinned(bare) == ()


@pytest.mark.slow
def test_an_honest_verdict_covers_all_requests(responses: Receipts, small_model: Model):
    """Of the answers that are shown each is honest; of those that are not shown nothing is
    known.
    """
    pins = ReceiptPins(known=KNOWN, requests=REQUESTS)
    some = Receipts.build(responses.header, responses.receipts[:2], 1.0)
    nothing = {"output": (), "sketches": np.zeros((0, 12), np.float16)}
    unsaid = [replace(one, **nothing, finish="stop") for one in responses.receipts[2:]]
    empty = Receipts.build(responses.header, [*some.receipts, *unsaid], 1.0)
    engine = HFPrefill(small_model)
    noise = noise_between(responses.header, engine.fingerprint, None)
    found = {
        name: judge_responses(replay(one, small_model, engine=engine) * 40, one, noise, pins=pins)
        for name, one in {"all": responses, "some": some, "empty": empty}.items()
    }
    assert [one.verdict for one in found.values()] == ["honest"] * 3
    codes = {name: (one.unanswered, one.exit_code) for name, one in found.items()}
    rest = (len(REQUESTS) - 2, 2)
    assert codes == {"all": (0, 0), "some": rest, "empty": rest}


def test_a_sample_is_drawn_by_its_seed_and_must_fit(responses: Receipts):
    assert sample_receipts(responses, None, 7) is responses
    assert len(sample_receipts(responses, 2, 7).receipts) == 2
    assert sample_receipts(responses, 2, 7).receipts == sample_receipts(responses, 2, 7).receipts
    with refuses(UsageError, "a sample is drawn by its seed and must fit"):
        sample_receipts(responses, 5, 7)


@pytest.fixture(scope="module")
def engines() -> dict[str, Model]:
    return {
        dtype: load_model("reference:qwen3", dtype=dtype, device="cpu")
        for dtype in ("float32", "bfloat16")
    }


@pytest.fixture(scope="module")
def served(engines: dict[str, Model]) -> dict[str, Receipts]:
    """Receipts of an honest node in bfloat16, and of one with weights of four bits that claims the
    same.
    """
    rng = np.random.default_rng(5)
    requests = [
        Request(
            prompt=tuple(rng.integers(5, 4000, 12).tolist()), request_id=f"r{place}", max_tokens=48
        )
        for place in range(8)
    ]
    common = {"block_hash": "block_alpha", "public_key": "node_A", "end_tokens": ()}
    nodes = {"honest": engines["bfloat16"], "int4": cheats.rounded(engines["bfloat16"], 4)}
    return {name: respond(node, requests, **common) for name, node in nodes.items()}


@pytest.mark.slow
def test_weights_of_four_bits_are_caught_and_the_honest_node_is_not(
    served: dict[str, Receipts], engines: dict[str, Model]
):
    verdicts = {}
    for name, receipts in served.items():
        engine = HFPrefill(engines["float32"])
        noise = noise_between(receipts.header, engine.fingerprint, None)
        found = replay(receipts, engines["float32"], engine=engine)
        verdicts[name] = judge_responses(found, receipts, noise)
    honest = verdicts["honest"]
    cheat = verdicts["int4"]
    assert honest.matches / honest.tokens > 0.98
    assert honest.verdict in ("honest", "undecided")
    assert (cheat.verdict, cheat.exit_code) == ("fraud", 1)
    assert min(cheat.result.tokens.log_e_max, cheat.result.sketches.log_e_max) > math.log(1000)
    assert "passes 1/0.001" in cheat.reason
    assert len(cheat.updates()) == 8


def test_receipts_of_more_engines_than_a_calibration_holds_are_refused():
    """Of 257, a file was written that could not be read."""
    header = make_header()
    engines = [replace(header.fingerprint, threads=number) for number in range(257)]
    headers = [replace(header, fingerprint=engine) for engine in engines]
    check_one_checkpoint(headers[1:])
    with pytest.raises(UsageError):
        check_one_checkpoint(headers)


@pytest.mark.slow
def test_a_calibration_is_measured_written_and_held_to_its_engines(
    served: dict[str, Receipts], engines: dict[str, Model], tmp_path
):
    receipts = served["honest"]
    engine = HFPrefill(engines["bfloat16"])
    found = replay(receipts, engines["bfloat16"], engine=engine)
    coarse = replace(
        receipts.header, fingerprint=replace(receipts.header.fingerprint, dtype="float32")
    )
    with refuses(UsageError, "a calibration is measured written and held to its engines"):
        calibrate_responses([(receipts.header, found[:4]), (coarse, found[4:])], engine.fingerprint)
    measured = calibrate_responses([(receipts.header, found)], engine.fingerprint)
    measured.save(tmp_path / "responses.json")
    read = ResponseCalibration.load(tmp_path / "responses.json")
    assert read == measured
    assert (read.responses, read.tokens) == (8, 8 * 48)
    assert noise_between(receipts.header, engine.fingerprint, read) == read.noise
    other: Fingerprint = replace(engine.fingerprint, dtype="float32")
    with refuses(CalibrationError, "a calibration is measured written and held to its engines, 2"):
        noise_between(receipts.header, other, read)
    with refuses(CalibrationError, "a calibration is measured written and held to its engines, 3"):
        read.check(replace(receipts.header, digest="0" * 64))
    (tmp_path / "responses.json").write_text('{"kind":"assay.poc.calibration","schema":2}\n')
    with refuses(
        CalibrationError, "a calibration is measured written and held to its engines, 4"
    ) as refused:
        ResponseCalibration.load(tmp_path / "responses.json")
    assert refused.value.seen.startswith(str(tmp_path / "responses.json"))


@pytest.mark.slow
def test_a_machine_of_a_calibration_is_a_public_key(
    served: dict[str, Receipts], engines: dict[str, Model]
):
    receipts = served["honest"]
    engine = HFPrefill(engines["bfloat16"])
    found = replay(receipts, engines["bfloat16"], engine=engine)
    header = receipts.header
    longer = replace(
        header, fingerprint=replace(header.fingerprint, seq_len=2 * header.fingerprint.seq_len)
    )
    other = replace(header, public_key="node_B")

    def noise(*headers):
        halves = zip(headers, (found[:4], found[4:]), strict=True)
        return calibrate_responses(list(halves), engine.fingerprint).noise

    one = noise(header, longer)
    two = noise(header, other)
    whole = calibrate_responses([(header, found)], engine.fingerprint).noise
    assert one.source == "calibration on 8 responses of 1 machines"
    assert one == whole, "one node with prompts of two lengths is one machine"
    assert two.source == "calibration on 8 responses of 2 machines"
    assert two.tokens.spread.dof == one.tokens.spread.dof + 1


@pytest.mark.slow
@pytest.mark.parametrize(("between", "found"), [(0.0, (0.0, 0.2, 0.4)), (1.1, (0.7, 1.1))])
def test_a_fit_finds_the_scale_and_the_spread_between_responses(
    between: float, found: tuple[float, ...]
):
    fit = fit_token_noise(drawn(80, 40, law_at(0.0625), between=between, seed=1))
    assert fit.between in found
    near = int(np.searchsorted(SCALES, 0.0625))
    assert sum(fit.law.weights[near - 2 : near + 2]) > 0.5
    assert fit.error < 0.3
    assert min(fit.law.weights) > 0  # what a sample does not show is not taken for absent


def test_a_response_without_tokens_says_nothing():
    clusters = drawn(8, 40, law_at(0.0625), between=0.7, seed=2)
    empty = np.zeros((0, COLUMNS))
    assert fit_token_noise([empty, *clusters[:4], empty, *clusters[4:], empty]) == fit_token_noise(
        clusters
    )


def test_engines_that_agree_on_every_token_leave_room_for_what_was_not_seen():
    certain = np.zeros((64, COLUMNS))
    certain[:, SCALES.searchsorted(1.0) :] = -2.0
    fit = fit_token_noise([certain] * 8)
    assert fit.law.weights[-1] >= 1e-6
    assert sum(fit.law.weights[SCALES.searchsorted(1.0) :]) < 0.02


def distances(responses: int, seed: int, *, odd: float = 0.0, at_once: bool = False):
    """Residuals of four sketches of each response; some are ten times as noisy."""
    rng = np.random.default_rng(seed)
    drawn_R4 = 0.01 * np.exp(0.3 * rng.standard_normal((responses, 4)))
    odd_R4 = rng.random((responses, 1 if at_once else 4)) < odd
    return list(np.where(odd_R4, 10 * drawn_R4, drawn_R4))


@pytest.mark.parametrize("at_once", [False, True])
def test_rare_noise_of_honest_sketches_accuses_nobody(at_once: bool):
    """The quantiles of a fit do not see one sketch, or one response, in twenty."""
    measured = distances(256, 0, odd=0.05, at_once=at_once)
    law, _ = fit_log_noise(np.concatenate(measured), tail=SKETCH_TAIL)
    fitted = PartNoise(law=law, spread=Spread(0.1), between=LEAST_BETWEEN)
    fair = fair_sketches(fitted, measured)
    assert (fair.law.sd, fair.between) >= (law.sd, LEAST_BETWEEN)
    highest = {}
    for name, part in {"fitted": fitted, "fair": fair}.items():
        test = ClusterTest(part.law, spread=part.spread, between=part.between)
        for response in distances(128, 1, odd=0.05, at_once=at_once):
            test.take(response, [len(response)])
        highest[name] = test.result.log_e_max
    assert highest["fair"] < math.log(1000) < highest["fitted"]


def test_a_law_of_sketches_whose_bets_are_fair_stays_as_it_was_fitted():
    measured = distances(256, 0)
    law, _ = fit_log_noise(np.concatenate(measured), tail=SKETCH_TAIL)
    part = PartNoise(law=law, spread=Spread(0.1), between=LEAST_BETWEEN)
    assert fair_sketches(part, measured) == part


@pytest.mark.parametrize(
    "clusters", [[], [np.zeros((10, COLUMNS))], [np.ones((300, COLUMNS))], [np.zeros((300, 3))]]
)
def test_what_is_no_sample_is_refused(clusters: list[np.ndarray]):
    with refuses(UsageError, "what is no sample is refused"):
        fit_token_noise(clusters)


@pytest.mark.slow
def test_too_few_tokens_or_sketches_that_can_be_used_are_refused(served: dict[str, Receipts]):
    def files(kept: int, **changes):
        receipts = served["honest"].receipts
        changed = [replace(one, **changes) for one in receipts[kept:]]
        return [Receipts.build(served["honest"].header, [*receipts[:kept], *changed], 1.0)]

    check_enough_tokens(files(8))
    for changes in ({"mask": True}, {"sampling": None}):
        check_enough_tokens(files(6, **changes))
        with refuses(UsageError, "too few tokens or sketches that can be used are refused"):
            check_enough_tokens(files(5, **changes))
    with_sketches = files(8)[0].receipts[:7]
    without = replace(files(8)[0].receipts[7], sketches=np.zeros((0, 12)))
    header = served["honest"].header
    files_of = ((header, with_sketches), (replace(header, sketched=False), [without]))
    mixed = [Receipts.build(head, receipts, 1.0) for head, receipts in files_of]
    with refuses(UsageError, "too few tokens or sketches that can be used are refused, 2"):
        check_enough_tokens(mixed)


@pytest.mark.no_law
def test_only_the_bundled_models_have_a_law_and_no_other_is_judged(
    responses: Receipts, small_model: Model, tmp_path
):
    """On 8580455f these receipts are honest by the law of another model."""
    assert bundled_response_noise(QWEN3, "float32", "bfloat16") == bundled_response_noise(
        QWEN3, "bfloat16", "float32"
    )
    assert bundled_response_noise(QWEN3, "int8-rows", "float32") is None
    assert bundled_response_noise(QWEN3, "float32", "float32") is not None
    assert noise_between(responses.header, HFPrefill(small_model).fingerprint, None) is None
    named = Receipts.build(
        replace(responses.header, reference="m; reboot"), responses.receipts, 1.0
    )
    verdict = judge_responses(replay(responses, small_model) * 40, named, None)
    assert (verdict.verdict, verdict.exit_code, verdict.as_dict()["test"]) == ("undecided", 2, None)
    assert "assay poc calibrate-responses honest.jsonl --model MODEL -o" in verdict.reason
    assert "reboot" not in verdict.reason  # the prover chose that name
    with refuses(UsageError, "only the bundled models have a law and no other is judged"):
        verdict.updates()
