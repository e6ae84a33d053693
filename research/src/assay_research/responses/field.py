"""One model and one dtype of provers against a verifier in float32: laws, thresholds, and who is
caught how soon.

An audit is a row of responses, drawn with replacement: all tokens of a response stay together. A
rival is a number for every token and a threshold for their mean; the threshold of every number of
tokens is the one that one in a thousand honest audits reach, drawn from the half that calibrates.
It may look once, after a number of tokens that it knows in advance. Ours is looked at after every
32 tokens and every sketch, at a threshold that holds for all looks together.

Legend of shapes: L responses, N tokens of a response, A audits, M tokens of an audit, G numbers of
tokens, D hidden size, K reported tokens, S sketches, B looks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from assay import stats
from assay.files.jsonl import JsonObject
from assay.models.model import Model
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE
from assay.poc.responses.adapters import Lora
from assay.poc.responses.prefill import HFPrefill, Prefilled, PromptAndOutput, sketch_response
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts
from assay.poc.responses.replaying import ReplayedResponse, replay
from assay.poc.responses.response_calibration import fit_response_noise
from assay.poc.responses.sampling import Sampling
from assay.poc.verdict.response_noise import ResponseNoise, ResponseTest
from assay.stats.token_law import COLUMNS
from assay_research.responses.cheats import Scene, honest
from assay_research.responses.provers import Requests, Served, make_requests, open_model
from assay_research.responses.rivals import CHUNK, RIVALS, FloatArray, Reply, logit_spread
from assay_research.runs.spread import first_reached

ALPHA = 1e-3
POWER = 0.99

MOST = 2048
WITHIN = (
    1,
    2,
    4,
    8,
    16,
)  # tokens of a chunk after which audits are looked at too, in the first eight chunks
GRID = tuple(
    sorted({*WITHIN, *(CHUNK * i + 1 for i in range(1, 9)), *range(CHUNK, MOST + 1, CHUNK)})
)
"""Numbers of tokens after which audits are looked at."""

IntArray = npt.NDArray[np.int64]
BATCH = 8  # sequences of the verifier's batches
BETA = 1e-2
HONEST_AUDITS = 4000
CHEAT_AUDITS = 400
MULTIPLE = 3.0
"""Noise over the honest one that our scores are the likelihood ratio of, where ours is used with a
threshold.

It was 8 in the first run, which was too coarse for cheats of two to four times the noise, and was
changed once, before the second run was made.
"""
OURS = {
    "margins": 0.0,
    "sketches": 2 * SKETCH_SIZE / SKETCH_EVERY,
    "both": 2 * SKETCH_SIZE / SKETCH_EVERY,
}
"""Bytes per token of our methods."""
BYTES = OURS | {rival.name: rival.bytes_per_token for rival in RIVALS}
"""Bytes per token of every method, beside the text."""


def drawn_means(
    values: Mapping[str, Sequence[FloatArray]], audits: int, rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Return, by method, the mean value of audits after each number of tokens in :data:`GRID`, [A,
    G].

    The first response of an audit begins at a chunk that is drawn too, so that short audits differ.

    Args:
        values: By method, the values of the tokens of every response, not-a-number where nothing is
            published.
        audits: Number of audits.
        rng: Source of what is drawn.
    """
    sizes = list(map(len, next(iter(values.values()))))
    rows_AM = np.stack([_tokens(sizes, rng) for _ in range(audits)])
    return {name: _means(np.concatenate(of_method)[rows_AM]) for name, of_method in values.items()}


def _tokens(sizes: Sequence[int], rng: np.random.Generator) -> IntArray:
    """Return the places of the tokens of one audit among those of all responses, [M]."""
    starts = np.cumsum([0, *sizes])
    chosen = int(rng.integers(len(sizes)))
    parts = [
        np.arange(
            starts[chosen] + CHUNK * rng.integers(-(-sizes[chosen] // CHUNK)), starts[chosen + 1]
        )
    ]
    while sum(map(len, parts)) < MOST:
        chosen = int(rng.integers(len(sizes)))
        parts.append(np.arange(starts[chosen], starts[chosen + 1]))
    return np.concatenate(parts)[:MOST]


def _means(values_AM: FloatArray) -> FloatArray:
    known_AM = ~np.isnan(values_AM)
    at = np.array(GRID) - 1
    sums_AG = np.where(known_AM, values_AM, 0.0).cumsum(axis=1)[:, at]
    counts_AG = known_AM.cumsum(axis=1)[:, at]
    # Before anything is published there is no evidence.
    return np.where(counts_AG > 0, sums_AG / np.maximum(counts_AG, 1), -np.inf)


def threshold(means_AG: FloatArray) -> FloatArray:
    """Return the thresholds that one in a thousand honest audits exceed after each number of
    tokens, [G].
    """
    return np.quantile(means_AG, 1 - ALPHA, axis=0, method="higher")


@dataclass(frozen=True)
class Looks:
    """What one response adds to the sums of a test, look by look.

    Args:
        paths: Additions up to each look, [B, K]; the last one is that of the whole response.
        tokens: Number of tokens of the response before each look, [B].
        size: Number of tokens of the response.
    """

    paths: FloatArray
    tokens: IntArray
    size: int


Evidence = Callable[[FloatArray], FloatArray]
"""From sums [..., K] to the logarithm of the e-value."""


def crossings(
    responses: Sequence[Looks], evidence: Evidence, audits: int, rng: np.random.Generator
) -> FloatArray:
    """Return the number of tokens after which audits are accused, [A]; infinite where they are not
    within the grid.

    Args:
        responses: Looks of every response.
        evidence: Function from sums to the logarithm of the e-value.
        audits: Number of audits.
        rng: Source of what is drawn.
    """
    found_A = np.full(audits, np.inf)
    sums_AK = np.zeros((audits, responses[0].paths.shape[1]))
    tokens_A = np.zeros(audits)
    waiting = np.arange(audits)
    while waiting.size:
        chosen = rng.integers(len(responses), size=waiting.size)
        for index in np.unique(chosen):
            looks = responses[index]
            rows = waiting[chosen == index]
            over_AB = evidence(sums_AK[rows, None] + looks.paths) >= -np.log(ALPHA)
            crossed = over_AB.any(axis=1)
            found_A[rows[crossed]] = (
                tokens_A[rows[crossed]] + looks.tokens[over_AB[crossed].argmax(axis=1)]
            )
            sums_AK[rows] += looks.paths[-1]
            tokens_A[rows] += looks.size
        waiting = waiting[np.isinf(found_A[waiting]) & (tokens_A[waiting] < GRID[-1])]
    return np.where(found_A <= GRID[-1], found_A, np.inf)


def share_by(crossings_A: FloatArray) -> FloatArray:
    """Return the share of audits accused after each number of tokens in :data:`GRID`, [G]."""
    return np.asarray((crossings_A[:, None] <= np.array(GRID)).mean(axis=0))


# The verifier's side: receipts as a node writes them, replayed as any node's, with what the rivals
# need kept beside.


@dataclass(frozen=True)
class Checked:
    """What the verifier knows of one response.

    Args:
        replayed: Result of the replay.
        reply: What the rivals score.
    """

    replayed: ReplayedResponse
    reply: Reply


def check(requests: Requests, served: Served, prover: Model, verifier: Model) -> list[Checked]:
    """Return what the verifier knows of every response.

    Args:
        requests: Requests that were answered.
        served: Answers.
        prover: Model that the prover claims to have run.
        verifier: Model that replays them.
    """
    engine = _Keeping(verifier, served)
    return [
        Checked(result, engine.reply(row, result))
        for row, result in enumerate(
            replay(receipts(requests, served, prover), verifier, engine=engine)
        )
    ]


def receipts(requests: Requests, served: Served, prover: Model) -> Receipts:
    """Return what the prover states of its answers."""
    seed = requests.seeds[0]
    positions = requests.prompts.shape[1] + served.tokens.shape[1]
    header = ReceiptHeader(
        public_key=seed.public_key,
        reference=prover.reference,
        digest=prover.digest,
        weights=prover.weights,
        fingerprint=HFEngine(prover, batch_size=len(requests.seeds), seq_len=positions).fingerprint,
    )
    stated = [_receipt(requests, served, row) for row in range(len(requests.seeds))]
    return Receipts.build(header, stated, seconds=0.0)


def _receipt(requests: Requests, served: Served, row: int) -> Receipt:
    seed = requests.seeds[row]
    states_ND = served.states[row]
    every = range(0, len(states_ND), SKETCH_EVERY)
    return Receipt(
        request_id=seed.request_id,
        user_seed=seed.user_seed,
        block_hash=seed.block_hash,
        prompt=Prompt.of(requests.prompts[row].tolist()),
        output=tuple(served.tokens[row].tolist()),
        sketches=sketch_response(states_ND[::SKETCH_EVERY], seed.words("sketch"), every)
        .cpu()
        .numpy(),
        sampling=requests.sampling,
        finish="length",
    )


class _Keeping:
    """The verifier's engine, which keeps its hidden states and what it says of the reported
    tokens.
    """

    def __init__(self, model: Model, served: Served) -> None:
        self._engine = HFPrefill(model, batch_size=BATCH)
        self._served = served
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def fingerprint(self) -> Fingerprint:
        """How it computes."""
        return self._engine.fingerprint

    def run(
        self, responses: Sequence[PromptAndOutput], adapter: Lora | None = None
    ) -> Iterator[tuple[int, Prefilled]]:
        """Run the responses."""
        for row, prefilled in self._engine.run(responses, adapter):
            assert prefilled.hidden is not None, "this engine shows them"
            own_NK = prefilled.logits.double().log_softmax(-1).gather(-1, self._served.top_ids[row])
            self._kept[row] = own_NK, prefilled.hidden
            yield row, prefilled

    def reply(self, row: int, replayed: ReplayedResponse) -> Reply:
        """Return what the rivals score of a response."""
        own_NK, own_ND = self._kept[row]
        sampling = replayed.receipt.sampling
        assert sampling is not None, "every prover here states it"
        return Reply(
            # Margins are in units of the noise, which are as many of the logits as the temperature
            # says.
            margins=replayed.margins.astype(np.float64) * (sampling.temperature or 1.0),
            logprobs=self._served.top_logprobs[row],
            own_logprobs=own_NK,
            states=self._served.states[row],
            own_states=own_ND,
        )


Scores = Mapping[str, Sequence[FloatArray]]
"""By method, the scores of the tokens of every response."""


@dataclass(frozen=True)
class Ours:
    """Our tests under the noise of honest responses.

    Args:
        noise: Honest noise.
    """

    noise: ResponseNoise

    @cached_property
    def tests(self) -> tuple[stats.ClusterTest, stats.ClusterTest]:
        """Tests of tokens and of sketches."""
        test = ResponseTest(self.noise, alpha=ALPHA, beta=BETA)
        return test.tokens, test.sketches

    def scores(self, response: ReplayedResponse) -> dict[str, FloatArray]:
        """Return our scores of the tokens of a response, [N]: ln of the likelihood ratio of larger
        noise.
        """
        tokens = self.noise.tokens.law
        sketched = self.noise.sketches.law
        assert isinstance(tokens, stats.TokenNoise)
        assert isinstance(sketched, stats.LogNoise)
        ratio_N = np.diff(tokens.log_likelihoods(response.profiles, np.log([1.0, MULTIPLE])))[:, 0]
        sizes_S = sketched.magnitudes(response.residuals)
        sketched_N = np.full(len(ratio_N), np.nan)
        sketched_N[::SKETCH_EVERY] = sketched.log_density(sizes_S, MULTIPLE) - sketched.log_density(
            sizes_S, 1.0
        )
        return {
            "margins": ratio_N,
            "sketches": sketched_N,
            "both": ratio_N + np.nan_to_num(sketched_N),
        }

    def looks(self, response: ReplayedResponse) -> Looks:
        """Return what a response adds to the sums of both tests at the end of every block of 32
        tokens.
        """
        ends = np.cumsum(response.blocks.sizes).tolist()
        tokens, sketched = self.tests
        parts = [
            tokens.paths(response.profiles, ends),
            sketched.paths(response.residuals, range(1, len(ends) + 1)),
        ]
        return Looks(np.concatenate(parts, axis=1), np.array(ends), ends[-1])

    def evidence(self) -> dict[str, Callable[[FloatArray], FloatArray]]:
        """Return, by method, the function from sums to the logarithm of the e-value; both is the
        mean of the two.
        """
        tokens, sketched = self.tests
        first = tokens.paths(np.zeros((0, COLUMNS)), [0]).shape[1]

        def margins(sums: FloatArray) -> FloatArray:
            return tokens.log_e(sums[..., :first])

        def of_sketches(sums: FloatArray) -> FloatArray:
            return sketched.log_e(sums[..., first:])

        return {
            "margins": margins,
            "sketches": of_sketches,
            "both": lambda sums: np.logaddexp(margins(sums), of_sketches(sums)) - np.log(2),
        }

    def audited(
        self, replays: Sequence[ReplayedResponse], audits: int, *, seed: int = 0
    ) -> dict[str, FloatArray]:
        """Return the tokens after which each test accuses audits of whole responses, [A], by
        test.
        """
        looks = [self.looks(response) for response in replays]
        rngs = {name: np.random.default_rng(seed) for name in OURS}
        return {
            name: crossings(looks, shown, audits, rngs[name])
            for name, shown in self.evidence().items()
        }


def share_accused(scores: Mapping[str, FloatArray]) -> dict[str, float]:
    """Return the share of audits that each test accuses within the grid."""
    return {name: float(np.isfinite(tokens_A).mean()) for name, tokens_A in scores.items()}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One model, one dtype of provers and one sampling.

    One half of the honest responses calibrates, the other one tests.

    Args:
        reference: Model.
        dtype: Dtype of provers.
        device: Device; the default one when None.
        honest: Number of honest responses.
        responses: Number of responses of every cheat.
        prompt_tokens: Length of every prompt.
        steps: Tokens of every response.
        sampling: Sampling that requests ask for.
        verifier_dtype: Dtype of the verifier.
    """

    reference: str
    dtype: str
    device: str | None
    honest: int
    responses: int
    prompt_tokens: int
    steps: int
    sampling: Sampling
    verifier_dtype: str = "float32"

    @cached_property
    def verifier(self) -> Model:
        """Honest model in the verifier's dtype."""
        return open_model(self.reference, self.verifier_dtype, self.device)

    @cached_property
    def scene(self) -> Scene:
        """Where provers work."""
        return Scene(self.reference, self.dtype, self.device)

    def requests(self, count: int, name: str) -> Requests:
        """Return requests of a name; equal names give equal requests."""
        return make_requests(
            self.verifier,
            count,
            prompt_tokens=self.prompt_tokens,
            steps=self.steps,
            sampling=self.sampling,
            name=name,
        )

    @cached_property
    def asked(self) -> Requests:
        """Requests that every cheat answers."""
        return self.requests(self.responses, "audited")

    @cached_property
    def halves(self) -> tuple[list[Checked], list[Checked]]:
        """Honest responses that calibrate, and those that test."""
        requests = self.requests(self.honest, "honest")
        replies = check(requests, honest(self.scene, requests), self.scene.model, self.verifier)
        return replies[: self.honest // 2], replies[self.honest // 2 :]

    @cached_property
    def sigma(self) -> float:
        """Spread of honest logits."""
        return logit_spread([response.reply for response in self.halves[0]])

    @cached_property
    def ours(self) -> Ours:
        """Our tests, under the noise of the calibrating half."""
        return Ours(
            fit_response_noise(
                [[response.replayed for response in self.halves[0]]], "the calibrating half"
            )
        )

    def checked(self, served: Served) -> list[Checked]:
        """Return what the verifier knows of answers to :attr:`asked`."""
        return check(self.asked, served, self.scene.model, self.verifier)

    def scores(self, responses: Sequence[Checked]) -> Scores:
        """Return the scores of all methods by name, of the tokens of every response."""
        by_method = []
        for response in responses:
            reply = replace(response.reply, sigma=self.sigma)
            rivals = {rival.name: rival.score(reply) for rival in RIVALS}
            by_method.append(self.ours.scores(response.replayed) | rivals)
        return {name: [response[name] for response in by_method] for name in BYTES}

    @cached_property
    def thresholds(self) -> dict[str, FloatArray]:
        """Thresholds [G] of every method, from the half that tests."""
        means = drawn_means(self.scores(self.halves[1]), HONEST_AUDITS, np.random.default_rng(0))
        return {name: threshold(means[name]) for name in BYTES}

    def sequential(self, responses: Sequence[Checked], audits: int) -> dict[str, FloatArray]:
        """Return the tokens after which each of our tests accuses audits, [A]; infinite for
        never.
        """
        return self.ours.audited([response.replayed for response in responses], audits, seed=1)

    def caught(self, responses: Sequence[Checked]) -> JsonObject:
        """Return, by method, how soon a program's answers are caught."""
        scores = self.scores(responses)
        thresholds = self.thresholds
        means = drawn_means(scores, CHEAT_AUDITS, np.random.default_rng(2))
        sequential = self.sequential(responses, CHEAT_AUDITS)
        rows: JsonObject = {}
        for name in BYTES:
            shares_G = (means[name] > thresholds[name]).mean(axis=0)
            rows[name] = {
                "threshold_99": first_reached(GRID, shares_G, POWER),
                "shares": [round(float(share), 4) for share in shares_G],
            }
            if name in sequential:
                by_G = share_by(sequential[name])
                rows[name]["sequential_99"] = first_reached(GRID, by_G, POWER)
                rows[name]["sequential"] = [round(float(p), 4) for p in by_G]
        return rows
