"""One model and one dtype of provers against a verifier in float32: laws, thresholds, and who is caught how soon.

Legend of shapes: N tokens, S sketches, B looks, K sums of a test, A audits, G numbers of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.files.jsonl import JsonObject
from assay.models.load import Model
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE
from assay.poc.responses.calibration import fit_response_noise
from assay.poc.responses.replay import Replayed
from assay.poc.responses.sampling import Sampling
from assay.poc.verdict.response_noise import ResponseNoise
from assay.stats.tokens import COLUMNS
from assay_research.responses.audits import ALPHA, Looks, caught_after, crossings, drawn_means, share_by, threshold
from assay_research.responses.cheats import Scene, honest
from assay_research.responses.check import Checked, check
from assay_research.responses.models import open_model
from assay_research.responses.provers import Requests, Served, make_requests
from assay_research.responses.rivals import RIVALS, logit_spread

FloatArray = npt.NDArray[np.float64]
Scores = Mapping[str, Sequence[FloatArray]]
"""By method, the scores of the tokens of every response."""

BETA = 1e-2

HONEST_AUDITS = 4000
CHEAT_AUDITS = 400
MULTIPLE = 3.0
"""Noise over the honest one that our scores are the likelihood ratio of, where ours is used with a threshold.

It was 8 in the first run, which was too coarse for cheats of two to four times the noise, and was changed once, before
the second run was made.
"""

OURS = {"margins": 0.0, "sketches": 2 * SKETCH_SIZE / SKETCH_EVERY, "both": 2 * SKETCH_SIZE / SKETCH_EVERY}
"""Bytes per token of our methods."""

BYTES = OURS | {rival.name: rival.bytes_per_token for rival in RIVALS}
"""Bytes per token of every method, beside the text."""


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
        return self.noise.tokens.test(alpha=ALPHA, beta=BETA), self.noise.sketches.test(alpha=ALPHA, beta=BETA)

    def scores(self, one: Replayed) -> dict[str, FloatArray]:
        """Return our scores of the tokens of a response, [N]: ln of the likelihood ratio of larger noise."""
        tokens, sketched = self.noise.tokens.law, self.noise.sketches.law
        assert isinstance(tokens, stats.TokenNoise)
        assert isinstance(sketched, stats.LogNoise)
        ratio_N = np.diff(tokens.log_likelihoods(one.profiles, np.log([1.0, MULTIPLE])))[:, 0]
        sizes_S = sketched.magnitudes(one.residuals)
        sketched_N = np.full(len(ratio_N), np.nan)
        sketched_N[::SKETCH_EVERY] = sketched.log_density(sizes_S, MULTIPLE) - sketched.log_density(sizes_S, 1.0)
        return {"margins": ratio_N, "sketches": sketched_N, "both": ratio_N + np.nan_to_num(sketched_N)}

    def looks(self, one: Replayed) -> Looks:
        """Return what a response adds to the sums of both tests at the end of every block of 32 tokens."""
        ends = one.blocks.ends
        tokens, sketched = self.tests
        parts = [tokens.paths(one.profiles, ends), sketched.paths(one.residuals, range(1, len(ends) + 1))]
        return Looks(np.concatenate(parts, axis=1), np.array(ends), ends[-1])

    def evidence(self) -> dict[str, Callable[[FloatArray], FloatArray]]:
        """Return, by method, the function from sums to the logarithm of the e-value; both is the mean of the two."""
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
            self.verifier, count, prompt_tokens=self.prompt_tokens, steps=self.steps, sampling=self.sampling, name=name
        )

    @cached_property
    def asked(self) -> Requests:
        """Requests that every cheat answers."""
        return self.requests(self.responses, "audited")

    @cached_property
    def halves(self) -> tuple[list[Checked], list[Checked]]:
        """Honest responses that calibrate, and those that test."""
        requests = self.requests(self.honest, "honest")
        found = check(requests, honest(self.scene, requests), self.scene.model, self.verifier)
        return found[: self.honest // 2], found[self.honest // 2 :]

    @cached_property
    def sigma(self) -> float:
        """Spread of honest logits."""
        return logit_spread([one.reply for one in self.halves[0]])

    @cached_property
    def ours(self) -> Ours:
        """Our tests, under the noise of the calibrating half."""
        return Ours(fit_response_noise([[one.replayed for one in self.halves[0]]], "the calibrating half"))

    def checked(self, served: Served) -> list[Checked]:
        """Return what the verifier knows of answers to :attr:`asked`."""
        return check(self.asked, served, self.scene.model, self.verifier)

    def scores(self, responses: Sequence[Checked]) -> Scores:
        """Return the scores of all methods by name, of the tokens of every response."""
        found = []
        for one in responses:
            reply = replace(one.reply, sigma=self.sigma)
            rivals = {rival.name: rival.score(reply) for rival in RIVALS}
            found.append(self.ours.scores(one.replayed) | rivals)
        return {name: [one[name] for one in found] for name in BYTES}

    @cached_property
    def thresholds(self) -> dict[str, FloatArray]:
        """Thresholds [G] of every method, from the half that tests."""
        means = drawn_means(self.scores(self.halves[1]), HONEST_AUDITS, np.random.default_rng(0))
        return {name: threshold(means[name]) for name in BYTES}

    def sequential(self, responses: Sequence[Checked], audits: int) -> dict[str, FloatArray]:
        """Return the tokens after which each of our tests accuses audits, [A]; infinite for never."""
        looks = [self.ours.looks(one.replayed) for one in responses]
        return {
            name: crossings(looks, evidence, audits, np.random.default_rng(1))
            for name, evidence in self.ours.evidence().items()
        }

    def caught(self, responses: Sequence[Checked]) -> JsonObject:
        """Return, by method, how soon a program's answers are caught."""
        scores, thresholds = self.scores(responses), self.thresholds
        means = drawn_means(scores, CHEAT_AUDITS, np.random.default_rng(2))
        sequential = self.sequential(responses, CHEAT_AUDITS)
        rows: JsonObject = {}
        for name in BYTES:
            shares_G = (means[name] > thresholds[name]).mean(axis=0)
            rows[name] = {
                "threshold_99": caught_after(shares_G),
                "shares": [round(float(share), 4) for share in shares_G],
            }
            if name in sequential:
                by_G = share_by(sequential[name])
                rows[name] |= {"sequential_99": caught_after(by_G), "sequential": [round(float(p), 4) for p in by_G]}
        return rows
