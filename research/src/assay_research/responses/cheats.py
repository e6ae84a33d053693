"""The cheats: programs that answer requests for less work, or other than was asked, and hand in
what they have.

Legend of shapes: B requests, T prompt positions, N output tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from assay.models.model import Model
from assay.poc import cheats
from assay_research import model_cheats
from assay_research.responses.provers import (
    PARTS,
    Float8Cache,
    Requests,
    Seeded,
    Served,
    Step,
    decode,
    open_model,
    tuned,
    with_honest_prefill,
    without_layers,
)

TUNED = (20, 200)
SAFE = (0.5, 2.0, 5.0)
PREFIX = 16  # tokens of a system prompt that was not asked for
DROPPED = 64  # index of the token that is left out
STOPPED = 95  # index at which an answer ends early
EOS = 2
SMALL_BATCH = 3


@dataclass(frozen=True)
class Scene:
    """Where cheats work: the honest model in the provers' dtype, and another one of the same
    vocabulary.

    Args:
        reference: Model that provers claim to run.
        dtype: Dtype of provers and cheats.
        device: Device; the default one when None.
    """

    reference: str
    dtype: str
    device: str | None = None

    @cached_property
    def model(self) -> Model:
        """Model of an honest prover."""
        return open_model(self.reference, self.dtype, self.device)

    @cached_property
    def int4(self) -> Model:
        """Same model with weights of four bits."""
        return cheats.rounded(self.model, 4)


Serve = Callable[[Scene, Requests], Served]


@dataclass(frozen=True)
class Cheat:
    """A cheat.

    Args:
        name: Name in tables.
        family: Group in tables: weights, models, cache, sampling, prompt or tokens.
        serve: Function that answers requests.
        reads_text: Whether it needs a model that reads text.
    """

    name: str
    family: str
    serve: Serve
    reads_text: bool = False


def honest(scene: Scene, requests: Requests) -> Served:
    """Answer as asked."""
    return decode(scene.model, requests)


def _in_small_batches(scene: Scene, requests: Requests) -> Served:
    """Answer honestly, a few requests at a time."""
    count = len(requests.seeds)
    parts = [
        honest(scene, requests.rows(start, start + SMALL_BATCH))
        for start in range(0, count, SMALL_BATCH)
    ]
    options: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in PARTS
    }
    return Served(**options)


def _with_plain_attention(scene: Scene, requests: Requests) -> Served:
    """Answer honestly, with the library's own attention in plain operations."""
    module = copy.deepcopy(scene.model.module)
    module.set_attn_implementation("eager")
    return decode(replace(scene.model, module=module), requests)


HONEST: dict[str, Serve] = {
    f"batches of {SMALL_BATCH}": _in_small_batches,
    "plain attention": _with_plain_attention,
}
"""Other ways to answer honestly."""


def _model(change: Callable[[Model], Model]) -> Serve:
    return lambda scene, requests: decode(change(scene.model), requests)


def _sampled(**other: float) -> Serve:
    def serve(scene: Scene, requests: Requests) -> Served:
        return decode(scene.model, requests, Seeded(requests, replace(requests.sampling, **other)))  # type: ignore[arg-type]

    return serve


def _prefixed(scene: Scene, requests: Requests) -> Served:
    """Answer after a system prompt, here the beginning of the neighbour's prompt."""
    prefix_BT = requests.prompts.roll(1, 0)[:, :PREFIX]
    return decode(scene.model, requests, prompts_BT=torch.cat([prefix_BT, requests.prompts], 1))


def _float8_cache(scene: Scene, requests: Requests) -> Served:
    return decode(scene.model, requests, cache=Float8Cache())


def _cached(scene: Scene, requests: Requests) -> Served:
    """Hand in what another request was answered with."""
    return replace(honest(scene, requests).changed(lambda part: part.roll(1, 0)), asked=0.0)


def _prefilled(serve: Serve) -> Serve:
    """Take tokens from one program, and all that is published of states from an honest prefill of
    them.
    """

    def both(scene: Scene, requests: Requests) -> Served:
        return with_honest_prefill(scene.model, requests, serve(scene, requests))

    return both


def _own_noise(scene: Scene, requests: Requests) -> Served:
    """Answer with the honest model and noise of one's own choosing."""
    shifted = replace(requests, seeds=requests.seeds[1:] + requests.seeds[:1])
    return decode(scene.model, shifted)


def _drafted(safe: float) -> Serve:
    """Keep the cheap model's token where its score leads by ``safe`` or more, in units of the
    noise; else ask.

    The prover knows the seed, so it sees how far the cheap model's token leads. The honest model is
    asked about the others, and everything that is published of states comes from its prefill.
    """

    def serve(scene: Scene, requests: Requests) -> Served:
        drafts: list[Tensor] = []
        seeded = Seeded(requests)

        def choose(step: int, step_of_draft: Step, beside: Step | None) -> Tensor:
            assert beside is not None, "the honest model reads along"
            best_B2, token_B2 = seeded.scores(step, step_of_draft).topk(2)
            asks_B = best_B2[:, 0] - best_B2[:, 1] < safe
            drafts.append(asks_B.float().mean())
            return torch.where(asks_B, seeded.scores(step, beside).argmax(-1), token_B2[:, 0])

        served = decode(scene.int4, requests, choose, beside=scene.model)
        return replace(
            with_honest_prefill(scene.model, requests, served),
            asked=float(torch.stack(drafts).mean()),
        )

    return serve


def _stopped(scene: Scene, requests: Requests) -> Served:
    """End the answer early, with the token that ends answers."""
    served = _kept(honest(scene, requests), torch.arange(STOPPED + 1))
    served.tokens[:, STOPPED] = EOS
    return served


def _shortened(scene: Scene, requests: Requests) -> Served:
    """Leave out one token of the answer."""
    return _kept(
        honest(scene, requests), torch.tensor([n for n in range(requests.steps) if n != DROPPED])
    )


def _kept(served: Served, steps_N: Tensor) -> Served:
    """Return an answer of some of its steps alone."""
    return served.changed(lambda part: part[:, steps_N])


def _all() -> Iterator[Cheat]:
    for bits in (8, 4):
        yield Cheat(f"int{bits} weights", "weights", _model(partial(cheats.rounded, bits=bits)))
    yield Cheat("fp8 weights", "weights", _model(model_cheats.rounded_fp8))
    yield Cheat("low-rank update of 2%", "weights", _model(model_cheats.adapted))
    for steps in TUNED:
        yield Cheat(
            f"fine-tuned, {steps} steps",
            "models",
            _model(partial(tuned, steps=steps)),
            reads_text=True,
        )
    yield Cheat("half of the layers, distilled", "models", _model(_distilled), reads_text=True)
    yield Cheat("one layer skipped", "models", _model(_without_middle))
    yield Cheat("last quarter skipped", "models", _model(_without_last_quarter))
    yield Cheat("fp8 cache", "cache", _float8_cache)
    yield Cheat("temperature 0.8 for 1", "sampling", _sampled(temperature=0.8))
    yield Cheat("top-p 0.8 for 0.95", "sampling", _sampled(top_p=0.8))
    yield Cheat("noise of its own", "sampling", _own_noise)
    yield Cheat("a system prompt", "prompt", _prefixed)
    yield Cheat("cached answer", "tokens", _cached)
    yield Cheat("cached answer, honest prefill", "tokens", _prefilled(_cached))
    yield Cheat("int4 tokens, honest prefill", "tokens", _prefilled(_model(cheats.rounded)))
    for safe in SAFE:
        yield Cheat(f"int4 tokens that lead by {safe:g}", "tokens", _drafted(safe))
    yield Cheat("stops early", "tokens", _stopped)
    yield Cheat("one token left out", "tokens", _shortened)


def _distilled(model: Model) -> Model:
    return tuned(without_layers(model, range(1, model.num_layers, 2)), max(TUNED))


def _without_middle(model: Model) -> Model:
    return without_layers(model, [model.num_layers // 2])


def _without_last_quarter(model: Model) -> Model:
    layers = model.num_layers
    return without_layers(model, range(layers - max(1, layers // 4), layers))


CHEATS = tuple(_all())
"""Every cheat, in the order of tables."""

GREEDY = tuple(
    cheat for cheat in CHEATS if cheat.name in ("int8 weights", "int4 weights", "fp8 weights")
)
"""Cheats that are measured at temperature 0 too."""
