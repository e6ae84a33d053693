"""A forward pass that leaves things out: the engine of every attack that saves work by skipping.

The attacker decides, for every position, through how many layers it goes, and for every layer
whether its attention and its MLP run, are dropped, or are replaced by a linear map. Of an MLP it
may also leave out the neurons that a position hardly uses. What is left out is not counted; all of
it is never computed but the neurons, which are set to zero here and would be skipped by a kernel
made for it.

Legend of shapes: B nonces, T positions, A positions that a layer updates, V positions that it sees,
D hidden size, N rows, F neurons of an MLP, H heads, E head size; in the regressions E = D + 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from assay.errors import UsageError
from assay.models.decoder import (
    ATTENTION_TARGETS,
    MLP_TARGETS,
    ModuleLayer,
    Rotation,
    backbone,
    causal_attention,
    decoder_layers,
)
from assay.models.eight_bits import EightBitLinear
from assay.models.load import load_model
from assay.models.model import Model
from assay.models.precision import wide_products
from assay.poc import cheats
from assay.poc.cheats import weight_of
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.transforms import Reading, unit
from assay.streams.arrays import dtype_name
from assay_research import model_cheats

RIDGE = 1e-4  # of the mean square of an input coordinate

Part = Literal["run", "drop", "linear"]


class Guesses:
    """What an attacker can know in advance: inputs are of a known law, so maps can be fitted before
    any round.

    For every layer, a linear map gives the update of the attention and of the MLP from their normed
    input; for every depth, one gives the final state, as a reading sees it, from the state at that
    depth. All are ridge regressions on rounds of the attacker's own, so a guess shrinks towards the
    mean where it knows little.
    """

    def __init__(
        self, model: Model, inputs_BTD: Tensor, readings: Sequence[Reading | None] = (None,)
    ) -> None:
        self.cost = model.hidden_size**2
        updates, states = _observe(model, inputs_BTD)
        with torch.inference_mode():
            body: Any = backbone(model.module)
            self._updates = {name: _fit(_with_one(x), y) for name, (x, y) in updates.items()}
            self._ends = {}
            for reading in readings:
                first = _first_scaled(reading)
                final_BRD = _seen(body.norm(states[-1][:, first:]), reading)
                self._ends[first] = [
                    _fit(_with_one(unit(x[:, first:])), final_BRD) for x in states[:-1]
                ]

    def update(self, part: str, index: int, x_BAD: Tensor) -> Tensor:
        """Return the update that attention or mlp of a layer would make, from its normed input [B,
        A, D].
        """
        return _with_one(x_BAD) @ self._updates[part, index]

    def end(self, depth: int, x_BAD: Tensor, reading: Reading | None = None) -> Tensor:
        """Return the final state of positions, as it is seen, from their state before layer
        ``depth``.
        """
        return _with_one(unit(x_BAD)) @ self._ends[_first_scaled(reading)][depth]


@dataclass(frozen=True)
class Shortcut:
    """What is left out.

    Args:
        depth: Number of layers that each position goes through, [T]; 0 for one that is never looked
            at.
        stale: Whether positions that left early stay visible to the others, with the state in which
            they left.
        attention: What happens to the attention of every layer; () runs all.
        mlp: What happens to the MLP of every layer; () runs all.
        window: Number of positions that attention looks back; 0 for all.
        neurons: Share of the neurons of every layer's MLP that are left out where they count least;
            () for none.
    """

    depth: tuple[int, ...]
    stale: bool = False
    attention: tuple[Part, ...] = ()
    mlp: tuple[Part, ...] = ()
    window: int = 0
    neurons: tuple[float, ...] = ()

    def layer(self, index: int) -> tuple[Part, Part, float]:
        """Return what happens to the attention and to the MLP of a layer, and the share of neurons
        left out.
        """
        attention: Part = self.attention[index] if self.attention else "run"
        mlp: Part = self.mlp[index] if self.mlp else "run"
        return attention, mlp, self.neurons[index] if self.neurons else 0.0


class PartialForward:
    """Runs a shortcut on a model of the Llama family; a UsageError where its layers have other
    parts.

    Guesses stand in for what is left out; without them a state stays as it is.
    """

    def __init__(self, model: Model, shortcut: Shortcut, guesses: Guesses | None = None) -> None:
        self._layers: Sequence[Any] = list(decoder_layers(model.module))
        self._body: Any = backbone(model.module)
        attention = [
            (getattr(layer, "self_attn", None), ATTENTION_TARGETS) for layer in self._layers
        ]
        mlps = [
            (getattr(layer, "mlp", None), MLP_TARGETS)
            for layer in self._layers
            if any(shortcut.neurons)
        ]
        if not all(hasattr(part, name) for part, names in attention + mlps for name in names):
            raise UsageError(
                f"attacks by skipping on {model.architecture}",
                wanted="layers with q_proj, k_proj, v_proj, o_proj, and for neurons gate_proj, "
                "up_proj, down_proj",
                do="attack another model, such as reference:qwen3",
            )
        self.shortcut = shortcut
        self.guesses = guesses

    def read(self, inputs_BTD: Tensor, reading: Reading | None) -> Tensor:
        """Return what an engine would: the last state, or the weighted sum of the unit states, [B,
        D] in float32.
        """
        states_BTD = self.states(inputs_BTD, reading)
        if reading is None:
            return states_BTD[:, -1]
        return torch.bmm(reading.weights.unsqueeze(1), states_BTD).squeeze(1)

    @torch.inference_mode()
    def states(self, inputs_BTD: Tensor, reading: Reading | None = None) -> Tensor:
        """Return a state for every position, [B, T, D] in float32: computed and seen by a reading,
        or guessed.

        A guess keeps its length: it is shorter where the attacker knows less. Without guesses, a
        position that is never looked at contributes nothing, and one that left early has the state
        in which it left.
        """
        depth_T = torch.tensor(self.shortcut.depth, device=inputs_BTD.device)
        x_BTD = inputs_BTD.clone()
        rotary = self._body.rotary_emb(
            x_BTD, torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        )
        for index, layer in enumerate(self._layers):
            active_A = torch.nonzero(depth_T > index).flatten()
            visible_V = torch.nonzero(depth_T > 0).flatten() if self.shortcut.stale else active_A
            if len(active_A):
                seen_BVD = x_BTD[:, visible_V]
                partial = _PartialLayer(layer, self, index, rotary, (active_A, visible_V))
                with wide_products(x_BTD):
                    x_BTD[:, active_A] = partial(seen_BVD, layer.input_layernorm(seen_BVD))
        return self._ends(x_BTD, depth_T, reading)

    def _ends(self, x_BTD: Tensor, depth_T: Tensor, reading: Reading | None) -> Tensor:
        """Take the final norm where all layers ran; guess the final state from the last known one
        elsewhere.
        """
        ends_BTD = self._body.norm(x_BTD).float()
        first = _first_scaled(reading)
        known_A = (
            torch.nonzero(depth_T[first:] == depth_T.max()).flatten() + first
        )  # by which others are scaled, too
        seen_A = known_A if first else slice(None)
        ends_BTD[:, seen_A] = _seen(ends_BTD[:, seen_A], reading)
        for depth in sorted(set(self.shortcut.depth) - {len(self._layers)}):
            left_A = torch.nonzero(depth_T == depth).flatten()
            if self.guesses is not None:
                ends_BTD[:, left_A] = self.guesses.end(depth, x_BTD[:, left_A], reading)
            elif depth == 0:
                ends_BTD[:, left_A] = 0
        return ends_BTD

    @property
    def cost(self) -> float:
        """Multiplications of this forward pass over those of the honest one; both count attention
        and linear layers.
        """
        full = Shortcut(depth=(len(self._layers),) * len(self.shortcut.depth))
        return self._count(self.shortcut) / self._count(full)

    def _count(self, shortcut: Shortcut) -> float:
        total = 0.0
        guessing = sum(depth < len(self._layers) for depth in shortcut.depth)
        for index, layer in enumerate(self._layers):
            attention, mlp, left_out = shortcut.layer(index)
            active = [t for t, depth in enumerate(shortcut.depth) if depth > index]
            visible = (
                [t for t, depth in enumerate(shortcut.depth) if depth > 0]
                if shortcut.stale
                else active
            )
            linear = layer.self_attn.q_proj.in_features**2
            if attention == "run":
                total += len(active) * (
                    _size(layer.self_attn.q_proj) + _size(layer.self_attn.o_proj)
                )
                total += len(visible) * (
                    _size(layer.self_attn.k_proj) + _size(layer.self_attn.v_proj)
                )
                total += (
                    2
                    * layer.self_attn.q_proj.out_features
                    * _pairs(active, visible, shortcut.window)
                )
            elif attention == "linear":
                total += len(active) * linear
            if mlp == "run":
                products = (
                    part
                    for part in layer.mlp.modules()
                    if isinstance(part, nn.Linear | EightBitLinear)
                )
                sizes: float = sum(map(_size, products))
                if left_out:
                    sizes -= left_out * (_size(layer.mlp.up_proj) + _size(layer.mlp.down_proj))
                total += len(active) * sizes
            elif mlp == "linear":
                total += len(active) * linear
        return total + guessing * (self.guesses.cost if self.guesses else 0)


class _PartialLayer(ModuleLayer):
    """What a shortcut leaves of a layer, which updates the positions A among the positions V that
    it sees.
    """

    def __init__(
        self,
        layer: Any,
        forward: PartialForward,
        index: int,
        rotary: Rotation,
        positions: tuple[Tensor, Tensor],
    ) -> None:
        self.active_A, self.visible_V = positions
        at_active, at_visible = (
            (rotary[0][0, at, None], rotary[1][0, at, None]) for at in positions
        )
        super().__init__(layer, at_visible, at_active)
        self.forward = forward
        self.index = index
        self.attention_kind, self.mlp_kind, self.neurons = forward.shortcut.layer(index)

    def updated(self, x: Tensor) -> Tensor:
        return x[:, torch.searchsorted(self.visible_V, self.active_A)]

    def attention(self, x: Tensor) -> Tensor:
        if self.attention_kind == "run":
            return super().attention(x)
        return self._guessed("attention", self.attention_kind, self.updated(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        back_AV = self.active_A[:, None] - self.visible_V[None]
        mask_AV = back_AV >= 0
        if window := self.forward.shortcut.window:
            mask_AV &= back_AV < window
        return causal_attention(q, k, v, self.layer.self_attn.scaling, mask_AV)

    def mlp(self, x: Tensor) -> Tensor:
        if self.mlp_kind != "run":
            return self._guessed("mlp", self.mlp_kind, x)
        output: Tensor = super().mlp(x) if self.neurons else self.layer.mlp(x)
        return output

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Leave out the neurons of least |gate| · ‖what it reads‖ · ‖what it writes‖, over the
        whole batch.

        The gate has to be computed to know them; with it, they are spared two of three products.
        """
        mlp = self.layer.mlp
        gate_BAF = mlp.act_fn(gate)
        norms_F = weight_of(mlp.up_proj).norm(dim=1) * weight_of(mlp.down_proj).norm(dim=0)
        worth_BAF = gate_BAF.float().abs() * norms_F
        least = worth_BAF.flatten().kthvalue(max(1, round(self.neurons * worth_BAF.numel()))).values
        sparse: Tensor = torch.where(worth_BAF <= least, torch.zeros_like(gate_BAF), gate_BAF) * up
        return sparse

    def _guessed(self, part: str, kind: Part, x_BAD: Tensor) -> Tensor:
        if kind == "drop" or self.forward.guesses is None:
            return torch.zeros_like(x_BAD)
        return self.forward.guesses.update(part, self.index, x_BAD).to(x_BAD.dtype)


def _seen(x: Tensor, reading: Reading | None) -> Tensor:
    """Return states as a reading sees them: unit, and in its frame or over their own positions if
    it has that.
    """
    return unit(x.float()) if reading is None else reading.seen(x)


def _first_scaled(reading: Reading | None) -> int:
    """Return the first position that a reading scales; 0 where it scales none, and every state is
    seen by itself.
    """
    return reading.first if reading is not None and reading.scaled else 0


def _size(layer: Any) -> int:
    return int(layer.in_features * layer.out_features)


def _pairs(active: Sequence[int], visible: Sequence[int], window: int) -> int:
    if not active or not visible:
        return 0
    back_AV = torch.tensor(active)[:, None] - torch.tensor(visible)[None]
    return int(((back_AV >= 0) & (back_AV < (window or 1 << 30))).sum())


def _observe(
    model: Model, inputs_BTD: Tensor
) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], list[Tensor]]:
    """Run the honest model; return inputs and outputs of its parts, and the state before every
    layer and after all.
    """
    updates: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    states: list[Tensor] = []
    handles = []
    layers: Any = decoder_layers(model.module)

    def keep(part: str, index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, keywords: Any, output: Any) -> None:
            x = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            updates[part, index] = (x, output[0] if isinstance(output, tuple) else output)

        return hook

    for index, layer in enumerate(layers):
        handles.append(
            layer.self_attn.register_forward_hook(keep("attention", index), with_kwargs=True)
        )
        handles.append(layer.mlp.register_forward_hook(keep("mlp", index), with_kwargs=True))
        handles.append(
            layer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
        )
    body: Any = backbone(model.module)
    handles.append(
        body.norm.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    )
    try:
        with torch.inference_mode(), wide_products(model):
            body(inputs_embeds=inputs_BTD, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return updates, states


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression of y on x, rows over all leading dimensions."""
    x_NE = x.flatten(0, -2).double()
    y_ND = y.flatten(0, -2).double()
    gram_EE = x_NE.T @ x_NE
    ridge = RIDGE * gram_EE.diagonal().mean()
    solved: Tensor = torch.linalg.solve(
        gram_EE + ridge * torch.eye(len(gram_EE), dtype=torch.float64, device=gram_EE.device),
        x_NE.T @ y_ND,
    )
    return solved.float()


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.float(), torch.ones_like(x[..., :1], dtype=torch.float32)], dim=-1)


# The attackers: programs that hand in what an honest node would, for less work or none.
#
# Every program reads a batch as an engine does: inputs [B, T, D] in, [B, D] out, either the last
# state or the signed sum over positions. Its cost is the work that it does over the work of the
# honest forward pass. For other weights, the multiplications are as many and each is cheaper: the
# price of a format is what hardware that has it charges at best.

Family = Literal["weights", "layers", "positions", "parts", "none"]


class Program(Protocol):
    """What an attacker runs in place of the engine."""

    @property
    def cost(self) -> float:
        """Work over the honest forward pass."""

    def read(self, inputs_BTD: Tensor, reading: Reading | None) -> Tensor:
        """Return the last state, or the weighted sum of unit states where a reading is given, [B,
        D] in float32.
        """


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where an attack takes place: the model in the attacker's dtype, and maps fitted in
    advance.
    """

    model: Model
    guesses: Guesses
    batch_size: int
    seq_len: int

    def price(self, bits: int) -> float:
        """Return the cost of a product of so many bits over an honest one, which has 8 or, by this
        count, 16.

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
        last_unknown: Whether it leaves out the last position, so that it is no attack where that
            one is read.
        in_float8: Whether it is an attack of provers in float8 only (True) or of others only
            (False); None for all.
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

    def read(self, inputs_BTD: Tensor, reading: Reading | None) -> Tensor:
        """Run the engine."""
        return self._engine.read(inputs_BTD, reading)


class Reused(OnEngine):
    """One forward pass for two nonces: the second hands in the state of the first."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene.engine(scene.model), cost=0.5)

    def read(self, inputs_BTD: Tensor, reading: Reading | None) -> Tensor:
        """Return the states of the neighbours; a node hands them in for every second nonce."""
        return super().read(inputs_BTD, reading).roll(1, 0)


class Invented:
    """No forward pass: a random state."""

    cost = 0.0

    def __init__(self, scene: Scene) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def read(self, inputs_BTD: Tensor, reading: Reading | None) -> Tensor:
        """Draw a direction."""
        return torch.randn(len(inputs_BTD), inputs_BTD.shape[-1], generator=self._generator).to(
            inputs_BTD.device
        )


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
    """Run positions t of T for which ``keep(t, T)`` is false through a share of ``depth``/8 of the
    layers only.
    """

    def make(scene: Scene) -> Program:
        T = scene.seq_len
        layers = scene.model.num_layers
        depths = tuple(layers if keep(t, T) else round(depth * layers / 8) for t in range(T))
        return PartialForward(
            scene.model, Shortcut(depths, stale=stale), scene.guesses if guess else None
        )

    return make


def _parts(
    which: Callable[[int, int], bool], kind: Part, *, attention: bool = True, mlp: bool = True
) -> Callable[[Scene], Program]:
    """Drop parts of the layers i of L for which ``which(i, L)`` holds, or replace them by linear
    maps.
    """

    def make(scene: Scene) -> Program:
        layers = scene.model.num_layers
        changed: tuple[Part, ...] = tuple(
            kind if which(i, layers) else "run" for i in range(layers)
        )
        shortcut = Shortcut(
            scene.full(), attention=changed if attention else (), mlp=changed if mlp else ()
        )
        return PartialForward(scene.model, shortcut, scene.guesses)

    return make


def _neurons(first: float, last: float, *, before: float = 1.0) -> Callable[[Scene], Program]:
    """Leave out a share of the neurons that rises with the layer, and drop positions from
    ``before``·T on.
    """

    def make(scene: Scene) -> Program:
        T = scene.seq_len
        layers = scene.model.num_layers
        depths = tuple(layers if _before(before, t, T) else 0 for t in range(T))
        shares = tuple(first + (last - first) * (index + 0.5) / layers for index in range(layers))
        return PartialForward(scene.model, Shortcut(depths, neurons=shares), scene.guesses)

    return make


def _quarter(layers: int) -> int:
    return max(1, round(layers / 4))


def _weights() -> Iterator[Attack]:
    for bits in (8, 4, 3):
        yield Attack(
            f"int{bits} weights", "weights", _other(partial(cheats.rounded, bits=bits), bits)
        )
    yield Attack("fp8 weights", "weights", _other(model_cheats.rounded_fp8, 8), in_float8=False)
    one_scale = model_cheats.with_one_scale
    of_inputs = partial(model_cheats.with_one_scale, inputs=True)
    yield Attack("one scale for a weight", "weights", _other(one_scale), in_float8=True)
    yield Attack(
        "one scale for a weight, one for its inputs", "weights", _other(of_inputs), in_float8=True
    )
    yield Attack("short sums", "weights", _other(model_cheats.with_short_sums), in_float8=True)
    for size in (0.005, 0.02, 0.1):
        yield Attack(
            f"low-rank update of {size:.1%}",
            "weights",
            _other(partial(model_cheats.adapted, size=size)),
        )
    yield Attack("another checkpoint", "weights", _other(_other_checkpoint))


def _layers() -> Iterator[Attack]:
    for name, which in (
        ("first layer", lambda i, L: i == 0),
        ("middle layer", lambda i, L: i == L // 2),
        ("last layer", lambda i, L: i == L - 1),
        ("first quarter of the layers", lambda i, L: i < _quarter(L)),
        (
            "middle quarter of the layers",
            lambda i, L: 0 <= i - (L - _quarter(L)) // 2 < _quarter(L),
        ),
        ("last quarter of the layers", lambda i, L: i >= L - _quarter(L)),
    ):
        yield Attack(f"{name} dropped", "layers", _parts(which, "drop"))
        if "quarter" in name:
            yield Attack(f"{name} linear", "layers", _parts(which, "linear"))
    for depth in (6, 4, 2, 0):
        yield Attack(
            f"early exit at {depth}/8", "layers", _positions(lambda t, T: False, depth=depth)
        )


def _skipped_positions() -> Iterator[Attack]:
    for share in (0.25, 0.5, 0.75, 0.875):
        yield Attack(f"first {share:.1%} dropped", "positions", _positions(partial(_after, share)))
    yield Attack(
        "last 25.0% dropped", "positions", _positions(partial(_before, 0.74)), last_unknown=True
    )
    yield Attack(
        "last 25.0% dropped, no guess",
        "positions",
        _positions(partial(_before, 0.74), guess=False),
        last_unknown=True,
    )
    yield Attack(
        "middle 25.0% dropped", "positions", _positions(lambda t, T: not 0.5 <= t / T < 0.76)
    )
    yield Attack(
        "ends dropped, 12.5% each",
        "positions",
        _positions(lambda t, T: 0.13 <= t / T < 0.87),
        last_unknown=True,
    )
    yield Attack(
        "every fourth dropped", "positions", _positions(lambda t, T: t == T - 1 or t % 4 != 2)
    )
    yield Attack("every second dropped", "positions", _positions(lambda t, T: (T - 1 - t) % 2 == 0))
    for depth, start in ((4, 0.48), (2, 0.64)):
        name = f"from {start:.0%} on, exit at {depth}/8"
        yield Attack(
            name, "positions", _positions(partial(_before, start), depth=depth), last_unknown=True
        )
    for depth, end in ((4, 0.56), (2, 0.38)):
        name = f"before {end:.0%}, exit at {depth}/8, stale"
        yield Attack(name, "positions", _positions(partial(_after, end), depth=depth, stale=True))
    yield Attack("only the last position in the last layer", "positions", _lazy_last_layer)
    for size in (64, 16):
        window = partial(Shortcut, window=size)
        yield Attack(f"sliding window of {size}", "positions", partial(_windowed, window))


def _after(share: float, t: int, T: int) -> bool:
    return t >= share * T


def _before(share: float, t: int, T: int) -> bool:
    return t < share * T


def _windowed(window: Callable[..., Shortcut], scene: Scene) -> Program:
    return PartialForward(scene.model, window(scene.full()))


def _lazy_last_layer(scene: Scene) -> Program:
    layers = scene.model.num_layers
    T = scene.seq_len
    return PartialForward(
        scene.model, Shortcut((layers - 1,) * (T - 1) + (layers,), stale=True), scene.guesses
    )


def _skipped_parts() -> Iterator[Attack]:
    yield Attack("attention linear", "parts", _parts(lambda i, L: True, "linear", mlp=False))
    yield Attack("attention dropped", "parts", _parts(lambda i, L: True, "drop", mlp=False))
    for name, which in (
        ("last", lambda i, L: i >= L - -(-3 * L // 8)),
        ("first", lambda i, L: i < -(-3 * L // 8)),
    ):
        yield Attack(
            f"{name} three eighths of the MLPs linear",
            "parts",
            _parts(which, "linear", attention=False),
        )
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
"""All attackers that run, or do not run, a forward pass. What a node does with honest results is
among its claims.
"""
