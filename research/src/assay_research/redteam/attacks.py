"""The attackers: programs that hand in what an honest node would, for less work or none.

Every program reads a batch as an engine does: inputs [B, T, D] in, [B, D] out, either the last state or the signed
sum over positions. Its cost is the work that it does over the work of the honest forward pass. For other weights, the
multiplications are as many and each is cheaper: the price of a format is what hardware that has it charges at best.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from assay.models.load import Model, load_model
from assay.poc import cheats
from assay.poc.engines.hf.engine import HFEngine
from assay.streams.backends import dtype_name
from assay_research.redteam.partial import Guesses, Part, PartialForward, Shortcut

Family = Literal["weights", "layers", "positions", "parts", "none"]


class Program(Protocol):
    """What an attacker runs in place of the engine."""

    @property
    def cost(self) -> float:
        """Work over the honest forward pass."""

    def read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Return the last state, or the weighted sum of unit states where weights are given, [B, D] in float32."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where an attack takes place: the model in the attacker's dtype, and maps fitted in advance."""

    model: Model
    guesses: Guesses
    batch_size: int
    seq_len: int

    def price(self, bits: int) -> float:
        """Return the cost of a product of so many bits over an honest one, which has 8 or, by this count, 16.

        It is that of hardware whose speed grows as bits shrink: a bound.
        """
        return min(1.0, bits / (8 if self.model.quantised else 16))

    def full(self) -> tuple[int, ...]:
        """Return the depth of every position in an honest forward pass."""
        return (self.model.num_layers,) * self.seq_len

    def engine(self, model: Model) -> HFEngine:
        """Return an engine of the attacker's batch shape."""
        return HFEngine(model, batch_size=self.batch_size, seq_len=self.seq_len)


@dataclass(frozen=True)
class Attack:
    """An attacker.

    Args:
        name: Name of the attack in tables.
        family: Saving on weights, layers, positions, parts of layers, or none of them.
        make: Function that builds the program.
        share: Share of the node's nonces that the program answers; the others are honest.
        last_unknown: Whether it leaves out the last position, so that it is no attack where that one is read.
        in_float8: Whether it is an attack of provers in float8 only (True) or of others only (False); None for all.
    """

    name: str
    family: Family
    make: Callable[[Scene], Program]
    share: float = 1.0
    last_unknown: bool = False
    in_float8: bool | None = None

    def serves(self, dtype: str) -> bool:
        """Return whether it is an attack of provers in this number format."""
        return self.in_float8 in (None, dtype == "float8")

    @property
    def skips(self) -> bool:
        """Whether it saves work by skipping."""
        return self.family in ("layers", "positions", "parts")


class OnEngine:
    """The honest program, on an engine that may hold another model."""

    def __init__(self, engine: HFEngine, cost: float = 1.0) -> None:
        self._engine = engine
        self.cost = cost

    def read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Run the engine."""
        return self._engine.read(inputs_BTD, weights_BT)


class Reused(OnEngine):
    """One forward pass for two nonces: the second hands in the state of the first."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene.engine(scene.model), cost=0.5)

    def read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Return the states of the neighbours; a node hands them in for every second nonce."""
        return super().read(inputs_BTD, weights_BT).roll(1, 0)


class Invented:
    """No forward pass: a random state."""

    cost = 0.0

    def __init__(self, scene: Scene) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Draw a direction."""
        return torch.randn(len(inputs_BTD), inputs_BTD.shape[-1], generator=self._generator).to(inputs_BTD.device)


def _other_checkpoint(model: Model) -> Model:
    return load_model(
        model.reference,
        dtype=dtype_name(model.dtype),
        device=str(model.device),
        weights="random-all",
        block_hash="another checkpoint",
        quantise=model.quantised or None,
    )


def _other(change: Callable[[Model], Model], bits: int = 16) -> Callable[[Scene], Program]:
    return lambda scene: OnEngine(scene.engine(change(scene.model)), scene.price(bits))


def _positions(
    keep: Callable[[int, int], bool], *, depth: int = 0, stale: bool = False, guess: bool = True
) -> Callable[[Scene], Program]:
    """Run positions t of T for which ``keep(t, T)`` is false through a share of ``depth``/8 of the layers only."""

    def make(scene: Scene) -> Program:
        T, layers = scene.seq_len, scene.model.num_layers
        depths = tuple(layers if keep(t, T) else round(depth * layers / 8) for t in range(T))
        return PartialForward(scene.model, Shortcut(depths, stale=stale), scene.guesses if guess else None)

    return make


def _parts(
    which: Callable[[int, int], bool], kind: Part, *, attention: bool = True, mlp: bool = True
) -> Callable[[Scene], Program]:
    """Drop parts of the layers i of L for which ``which(i, L)`` holds, or replace them by linear maps."""

    def make(scene: Scene) -> Program:
        layers = scene.model.num_layers
        changed: tuple[Part, ...] = tuple(kind if which(i, layers) else "run" for i in range(layers))
        shortcut = Shortcut(scene.full(), attention=changed if attention else (), mlp=changed if mlp else ())
        return PartialForward(scene.model, shortcut, scene.guesses)

    return make


def _neurons(first: float, last: float, *, before: float = 1.0) -> Callable[[Scene], Program]:
    """Leave out a share of the neurons that rises with the layer, and drop positions from ``before``·T on."""

    def make(scene: Scene) -> Program:
        T, layers = scene.seq_len, scene.model.num_layers
        depths = tuple(layers if _before(before, t, T) else 0 for t in range(T))
        shares = tuple(first + (last - first) * (index + 0.5) / layers for index in range(layers))
        return PartialForward(scene.model, Shortcut(depths, neurons=shares), scene.guesses)

    return make


def _quarter(layers: int) -> int:
    return max(1, round(layers / 4))


def _weights() -> Iterator[Attack]:
    for bits in (8, 4, 3):
        yield Attack(f"int{bits} weights", "weights", _other(partial(cheats.rounded, bits=bits), bits))
    yield Attack("fp8 weights", "weights", _other(cheats.rounded_fp8, 8), in_float8=False)
    one_scale, of_inputs = cheats.with_one_scale, partial(cheats.with_one_scale, inputs=True)
    yield Attack("one scale for a weight", "weights", _other(one_scale), in_float8=True)
    yield Attack("one scale for a weight, one for its inputs", "weights", _other(of_inputs), in_float8=True)
    yield Attack("short sums", "weights", _other(cheats.with_short_sums), in_float8=True)
    for size in (0.005, 0.02, 0.1):
        yield Attack(f"low-rank update of {size:.1%}", "weights", _other(partial(cheats.adapted, size=size)))
    yield Attack("another checkpoint", "weights", _other(_other_checkpoint))


def _layers() -> Iterator[Attack]:
    for name, which in (
        ("first layer", lambda i, L: i == 0),
        ("middle layer", lambda i, L: i == L // 2),
        ("last layer", lambda i, L: i == L - 1),
        ("first quarter of the layers", lambda i, L: i < _quarter(L)),
        ("middle quarter of the layers", lambda i, L: 0 <= i - (L - _quarter(L)) // 2 < _quarter(L)),
        ("last quarter of the layers", lambda i, L: i >= L - _quarter(L)),
    ):
        yield Attack(f"{name} dropped", "layers", _parts(which, "drop"))
        if "quarter" in name:
            yield Attack(f"{name} linear", "layers", _parts(which, "linear"))
    for depth in (6, 4, 2):
        yield Attack(f"early exit at {depth}/8", "layers", _positions(lambda t, T: False, depth=depth))


def _skipped_positions() -> Iterator[Attack]:
    for share in (0.25, 0.5, 0.75, 0.875):
        yield Attack(f"first {share:.1%} dropped", "positions", _positions(partial(_after, share)))
    yield Attack("last 25.0% dropped", "positions", _positions(partial(_before, 0.74)), last_unknown=True)
    yield Attack(
        "last 25.0% dropped, no guess", "positions", _positions(partial(_before, 0.74), guess=False), last_unknown=True
    )
    yield Attack("middle 25.0% dropped", "positions", _positions(lambda t, T: not 0.5 <= t / T < 0.76))
    yield Attack(
        "ends dropped, 12.5% each", "positions", _positions(lambda t, T: 0.13 <= t / T < 0.87), last_unknown=True
    )
    yield Attack("every fourth dropped", "positions", _positions(lambda t, T: t == T - 1 or t % 4 != 2))
    yield Attack("every second dropped", "positions", _positions(lambda t, T: (T - 1 - t) % 2 == 0))
    for depth, start in ((4, 0.48), (2, 0.64)):
        name = f"from {start:.0%} on, exit at {depth}/8"
        yield Attack(name, "positions", _positions(partial(_before, start), depth=depth), last_unknown=True)
    for depth, end in ((4, 0.56), (2, 0.38)):
        name = f"before {end:.0%}, exit at {depth}/8, stale"
        yield Attack(name, "positions", _positions(partial(_after, end), depth=depth, stale=True))
    yield Attack("only the last position in the last layer", "positions", _lazy_last_layer)
    yield Attack("sliding window of 64", "positions", _window)


def _after(share: float, t: int, T: int) -> bool:
    return t >= share * T


def _window(scene: Scene) -> Program:
    return PartialForward(scene.model, Shortcut(scene.full(), window=64))


def _before(share: float, t: int, T: int) -> bool:
    return t < share * T


def _lazy_last_layer(scene: Scene) -> Program:
    layers, T = scene.model.num_layers, scene.seq_len
    return PartialForward(scene.model, Shortcut((layers - 1,) * (T - 1) + (layers,), stale=True), scene.guesses)


def _skipped_parts() -> Iterator[Attack]:
    yield Attack("attention linear", "parts", _parts(lambda i, L: True, "linear", mlp=False))
    yield Attack("attention dropped", "parts", _parts(lambda i, L: True, "drop", mlp=False))
    for name, which in (("last", lambda i, L: i >= L - -(-3 * L // 8)), ("first", lambda i, L: i < -(-3 * L // 8))):
        yield Attack(f"{name} three eighths of the MLPs linear", "parts", _parts(which, "linear", attention=False))
    yield Attack("20% of the neurons", "parts", _neurons(0.2, 0.2))
    yield Attack("25% to 85% of the neurons", "parts", _neurons(0.25, 0.85))
    for first, last, before in ((0.1, 0.3, 0.83), (0.1, 0.5, 0.875)):
        name = f"{first:.0%} to {last:.0%} of the neurons, last {1 - before:.1%} dropped"
        yield Attack(name, "parts", _neurons(first, last, before=before), last_unknown=True)


ATTACKS: tuple[Attack, ...] = (
    *_weights(),
    *_layers(),
    *_skipped_positions(),
    *_skipped_parts(),
    Attack("state of another nonce", "none", Reused, share=0.5),
    Attack("invented", "none", Invented),
)
"""All attackers that run, or do not run, a forward pass. What a node does with honest results is in `_claims`."""
