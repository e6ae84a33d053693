"""The models of the experiment: bundled ones, one with random weights whose logits are like trained
ones, and variants.

**Logits like trained ones.** A model with random weights is nearly indifferent between tokens, so
every token would be decided by its noise and no cheat could be seen in them. ``trained-like`` has
the layers of Qwen3 with random weights and a head that is not tied to its embeddings. The head is
scaled by one number, found by bisection, with which the mean entropy of next tokens equals
`TRAINED_ENTROPY`, that of the bundled Qwen3 over its own text.

Legend of shapes: B requests, T prompt positions, N output tokens, V vocabulary, D hidden size, K
reported tokens.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from assay.errors import UsageError
from assay.models.configuration import silence_transformers
from assay.models.decoder import backbone, decoder_layers, head_of
from assay.models.load import load_model, load_tokenizer
from assay.models.model import Model
from assay.models.precision import wide_products
from assay.poc.responses.prefill import HFPrefill, PromptAndOutput
from assay.poc.responses.sampler import Sampler
from assay.poc.responses.sampling import ResponseSeed, Sampling
from assay_research.organism import Mixture, examples

TRAINED_LIKE = "trained-like"
"""Name of the model with random weights in the list of models."""

TRAINED_ENTROPY = 2.4
"""Mean entropy of next tokens, in nats, of the bundled Qwen3 over text that it wrote itself at
temperature 1.
"""

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

RATE = 1e-4
BATCH = 2
LONGEST = 128  # tokens of an example
_PROBED = (4, 64)  # rows and positions over which the entropy is measured
_IGNORED = -100
REPORTED = 5
"""Likeliest tokens of every step that a prover reports, as the network's executors do."""
BOS = 1
PROMPT_KEY = "prompts"
PARTS = ("tokens", "states", "top_ids", "top_logprobs")
"""What an answer consists of, [B, N, …]."""


def open_model(reference: str, dtype: str, device: str | None = None) -> Model:
    """Load a model of the experiment; ``trained-like`` is made on the spot.

    Raises:
        ModelNotFound: There is no such model.
    """
    if reference != TRAINED_LIKE:
        return load_model(reference, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        _write_trained_like(Path(folder))
        return replace(load_model(folder, dtype=dtype, device=device), reference=TRAINED_LIKE)


def reads_text(reference: str) -> bool:
    """Return whether a model of the experiment has a tokenizer, without loading its weights.

    Raises:
        ModelNotFound: There is no such model.
    """
    return reference != TRAINED_LIKE and load_tokenizer(reference) is not None


def _write_trained_like(folder: Path) -> None:
    """Write the checkpoint with a head of the scale that is described above, in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE))  # type: ignore[no-untyped-call]
        ids_BT = torch.randint(3, SHAPE["vocab_size"], _PROBED)
    with torch.inference_mode():
        logits_XV = module(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1).float()
    with torch.no_grad():
        module.lm_head.weight.mul_(scale_for(logits_XV, TRAINED_ENTROPY))
    with silence_transformers():
        module.to(torch.bfloat16).save_pretrained(folder)


def scale_for(logits_XV: torch.Tensor, wanted: float) -> float:
    """Return the factor of logits [X, V] with which their mean entropy is ``wanted`` nats, to a
    thousandth.
    """
    low = 1e-3
    high = 1e3
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle * logits_XV) > wanted else (low, middle)
    return low


def entropy(logits_XV: torch.Tensor) -> float:
    """Return the mean entropy of next tokens, in nats."""
    logs_XV = logits_XV.float().log_softmax(-1)
    return float(-(logs_XV.exp() * logs_XV).sum(-1).mean())


def tuned(model: Model, steps: int) -> Model:
    """Return the model after ``steps`` steps of fine-tuning on short programs, in its own dtype.

    Weights are float32 while they are trained.

    Raises:
        UsageError: The model has no tokenizer, so there is no text for it.
    """
    if model.tokenizer is None:
        raise UsageError(
            f"{model.reference} has no tokenizer",
            wanted="a model that reads text",
            do="choose another",
        )
    module: Any = copy.deepcopy(model.module).float().train()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    rows = [model.tokenizer(text).input_ids[:LONGEST] for text in _texts()]
    for step in range(steps):
        chosen = [rows[(step * BATCH + index) % len(rows)] for index in range(BATCH)]
        width = max(map(len, chosen))
        labels_BT = torch.tensor(
            [row + [_IGNORED] * (width - len(row)) for row in chosen], device=model.device
        )
        logits = module(input_ids=labels_BT.clamp_min(0), use_cache=False).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return replace(model, module=module.to(model.dtype).eval())


@cache
def _texts() -> Sequence[str]:
    return [example.prompt + example.completion for example in examples(512, Mixture())]


def without_layers(model: Model, skipped: Sequence[int]) -> Model:
    """Return the model without some of its decoder layers, which also a cache counts as it
    should.
    """
    module: Any = copy.deepcopy(model.module)
    layers: Any = decoder_layers(module)
    for index in sorted(skipped, reverse=True):
        del layers[index]
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    module.config.num_hidden_layers = len(layers)
    return replace(model, module=module)


# What a prover hands in for a batch of requests, and what the verifier's one prefill says of it.
#
# Provers decode token by token with a cache, as a server does; the verifier reads prompt and output
# at once.


UInts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Requests:
    """Requests of one prompt length, answered in one batch.

    Args:
        prompts: Token ids of the prompts, [B, T].
        seeds: Seed of every request.
        sampling: Sampling that the answers claim.
        steps: Number of output tokens N.
    """

    prompts: Tensor
    seeds: tuple[ResponseSeed, ...]
    sampling: Sampling
    steps: int

    @cached_property
    def noise(self) -> UInts:
        """Seed of the noise of every step, [B, N]."""
        return np.stack([seed.step_seeds(range(self.steps)) for seed in self.seeds])

    def rows(self, start: int, stop: int) -> "Requests":
        """Return some of the requests."""
        return replace(self, prompts=self.prompts[start:stop], seeds=self.seeds[start:stop])


@dataclass(frozen=True)
class Served:
    """What a prover hands in.

    Args:
        tokens: Output tokens, [B, N].
        states: Last hidden states that gave them, [B, N, D] in float32: whatever is published is
            made of these.
        top_ids: Ids of the likeliest tokens that it reports, [B, N, K].
        top_logprobs: Their raw log-probabilities, [B, N, K].
        asked: Share of the tokens for which the honest model was asked.
    """

    tokens: Tensor
    states: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    asked: float = 1.0

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Served":
        """Return what is handed in when every part [B, N, …] of it is changed by a function."""
        parts: dict[str, Any] = {name: change(getattr(self, name)) for name in PARTS}
        return replace(self, **parts)


@dataclass(frozen=True)
class Step:
    """One step of a model: logits [B, V] and last hidden states [B, D], in float32."""

    logits: Tensor
    state: Tensor


class Runner:
    """A model with a cache, fed a piece at a time.

    Args:
        model: Model that runs.
        cache: Cache of keys and values; a plain one when None.
    """

    def __init__(self, model: Model, cache: DynamicCache | None = None) -> None:
        self._model = model
        self._body: Any = backbone(model.module)
        self._head = head_of(model.module)
        self._cache = DynamicCache() if cache is None else cache

    @torch.inference_mode()
    def feed(self, ids_BT: Tensor) -> Step:
        """Read tokens and return what the model says after the last of them."""
        with wide_products(self._model):
            output = self._body(input_ids=ids_BT, past_key_values=self._cache, use_cache=True)
            state_BD = output.last_hidden_state[:, -1]
            return Step(self._head(state_BD).float(), state_BD.float())


class Float8Cache(DynamicCache):
    """A cache whose keys and values are rounded to float8 (e4m3), with one scale for all."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Round, then keep."""
        return super().update(
            _float8(key_states), _float8(value_states), layer_idx, *args, **kwargs
        )


def _float8(x: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype)


Choose = Callable[[int, Step, Step | None], Tensor]
"""From the index of a step, what the model said and what the model beside it said: the tokens, [B].
"""


class Seeded:
    """Chooses tokens as asked: the noise is that of the requests.

    Args:
        requests: Requests that are answered.
        sampling: Sampling that is used in place of the one that the requests ask for.
    """

    def __init__(self, requests: Requests, sampling: Sampling | None = None) -> None:
        self._requests = requests
        self._sampling = sampling or requests.sampling
        self._sampler: Sampler | None = None

    def scores(self, step: int, said: Step) -> Tensor:
        """Return the scores of all tokens in a step, [B, V]."""
        if self._sampler is None:
            rows, vocabulary = said.logits.shape
            self._sampler = Sampler([self._sampling] * rows, vocabulary, said.logits.device)
        return self._sampler.scores(said.logits, self._requests.noise[:, step])

    def __call__(self, step: int, said: Step, beside: Step | None) -> Tensor:
        """Return the tokens of a step, [B]."""
        return self.scores(step, said).argmax(-1)


def decode(
    model: Model,
    requests: Requests,
    choose: Choose | None = None,
    *,
    prompts_BT: Tensor | None = None,
    cache: DynamicCache | None = None,
    beside: Model | None = None,
) -> Served:
    """Answer requests token by token.

    Args:
        model: Model that answers.
        requests: Requests that are answered.
        choose: Function that chooses the tokens; the honest one when None.
        prompts_BT: Prompts that are read in place of the requests' own, [B, T].
        cache: Cache of keys and values; a plain one when None.
        beside: Model that reads the same tokens and may be asked by ``choose``; its states are not
            handed in.
    """
    choose = choose or Seeded(requests)
    runner = Runner(model, cache)
    second = Runner(beside) if beside else None
    fed = requests.prompts if prompts_BT is None else prompts_BT
    columns: list[tuple[Tensor, ...]] = []
    for step in range(requests.steps):
        outputs = runner.feed(fed)
        token_B = choose(step, outputs, second.feed(fed) if second else None)
        columns.append((token_B, outputs.state, *_top(outputs.logits)))
        fed = token_B[:, None]
    tokens_BN, states_BND, ids_BNK, logprobs_BNK = (
        torch.stack(part, 1) for part in zip(*columns, strict=True)
    )
    return Served(tokens_BN, states_BND, ids_BNK, logprobs_BNK)


def _top(logits_XV: Tensor) -> tuple[Tensor, Tensor]:
    largest = logits_XV.log_softmax(-1).topk(REPORTED)
    return largest.indices, largest.values


def with_honest_prefill(model: Model, requests: Requests, served: Served) -> Served:
    """Return the same tokens with everything else taken from an honest prefill of them."""
    rows = zip(requests.prompts.tolist(), served.tokens.tolist(), strict=True)
    responses = [PromptAndOutput(tuple(prompt), tuple(output)) for prompt, output in rows]
    prefilled = dict(HFPrefill(model, batch_size=8).run(responses))
    columns = [
        (prefilled_output.hidden, *_top(prefilled_output.logits))
        for _, prefilled_output in sorted(prefilled.items())
    ]
    states_BND, ids_BNK, logprobs_BNK = (torch.stack(part) for part in zip(*columns, strict=True))
    return replace(served, states=states_BND, top_ids=ids_BNK, top_logprobs=logprobs_BNK)


def make_requests(
    model: Model,
    count: int,
    *,
    prompt_tokens: int,
    steps: int,
    sampling: Sampling,
    name: str = "request",
) -> Requests:
    """Return requests whose prompts the honest model has written itself, from its first token on.

    Args:
        model: Model in float32 that writes the prompts.
        count: Number of requests B.
        prompt_tokens: Length T of every prompt.
        steps: Number of output tokens N.
        sampling: Sampling that is asked for.
        name: Beginning of the request ids.
    """
    start_B1 = torch.full((count, 1), BOS, device=model.device)
    written = Requests(
        start_B1, named_seeds(model, count, f"{PROMPT_KEY} {name}"), Sampling(), prompt_tokens - 1
    )
    prompts_BT = torch.cat([start_B1, decode(model, written).tokens], 1)
    return Requests(prompts_BT, named_seeds(model, count, name), sampling, steps)


def named_seeds(model: Model, count: int, name: str) -> tuple[ResponseSeed, ...]:
    """Return the seeds of requests of a name."""
    return tuple(
        ResponseSeed(
            user_seed="",
            request_id=f"{name} {index}",
            public_key="node_A",
            digest=model.digest,
            block_hash="block_alpha",
        )
        for index in range(count)
    )
