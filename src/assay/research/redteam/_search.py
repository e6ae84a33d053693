"""How many positions must be read? For each number, the cheapest error that an attacker can buy by skipping positions.

The positions read are known to the attacker: they follow from the nonce. So he leaves out what matters least to them.
Every strategy is tuned to save at least a quarter of the work.

Legend of shapes: T positions, M positions read, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from assay.poc.engines import make_transform
from assay.poc.protocol import PIPELINES, Positions, unit, weighted_sum
from assay.reports import JsonObject
from assay.research.redteam._field import Field
from assay.research.redteam._partial import PartialForward, Shortcut

__all__ = ["SAVED", "search", "strategies"]

SAVED = 0.25
READ = (1, 4, 16, 64, 128, 256)

Depths = tuple[int, ...]


def search(field: Field, nonces: int) -> list[JsonObject]:
    """Return, for each number of positions read and each strategy, its error and cost, [rows]."""
    rows: list[JsonObject] = []
    for count in READ:
        if count > field.seq_len:
            continue
        found = [_nonce(field, count, nonce) for nonce in range(nonces)]
        for name in found[0]:
            errors, costs = zip(*(one[name] for one in found), strict=True)
            row = {"positions": count, "strategy": name, "error_mean": float(np.mean(errors))}
            rows.append(row | {"cost": float(np.mean(costs))})
    return rows


def _nonce(field: Field, count: int, nonce: int) -> dict[str, tuple[float, float]]:
    """Attack one nonce; return error and cost of every strategy."""
    model, T = field.validator.model, field.seq_len
    round = field.round("hardened")
    weights_1T = _weights(field, count, nonce)
    inputs_1TD = field.validator.inputs(round, [nonce])
    layers = model.num_layers
    honest_1D = unit(weighted_sum(PartialForward(model, Shortcut((layers,) * T)).states(inputs_1TD), weights_1T))
    read = torch.nonzero(weights_1T[0]).flatten().tolist()
    found = {}
    for name, shortcut in strategies(read, T, layers):
        program = PartialForward(model, shortcut, field.scene.guesses)
        error = (unit(program.read(inputs_1TD, weights_1T)) - honest_1D).norm()
        found[name] = (float(error), program.cost)
    return found


def _weights(field: Field, count: int, nonce: int) -> torch.Tensor:
    if count == 1:  # the last one, as the published presets read it
        return torch.eye(field.seq_len)[-1:].to(field.validator.device)
    pipeline = replace(PIPELINES["hardened"], read=Positions(count))
    transform = make_transform(field.validator, field.round("hardened"), pipeline)
    weights_BT = transform.weights([nonce], field.seq_len)
    assert weights_BT is not None
    return weights_BT


def strategies(read: list[int], T: int, layers: int) -> Iterator[tuple[str, Shortcut]]:
    """Give the ways to save a quarter of the work when the positions in ``read`` are read.

    Positions are ranked by use: unread ones that are farthest from the next read one go first.
    """
    ranked = _by_use(read, T)
    dropped = -(-26 * T // 100)  # a quarter, and what the guesses cost
    yield "least useful dropped", Shortcut(_depths(T, layers, ranked[:dropped], 0))
    for depth in (layers // 4, layers // 2):
        left = min(T, int(1.1 * dropped * layers / (layers - depth)))
        yield f"least useful leave at {depth}, stale", Shortcut(_depths(T, layers, ranked[:left], depth), stale=True)
        yield f"least useful leave at {depth}", Shortcut(_depths(T, layers, ranked[:left], depth))
    yield "first dropped", Shortcut(_depths(T, layers, list(range(dropped)), 0))
    yield "last dropped", Shortcut(_depths(T, layers, list(range(T - dropped, T)), 0))
    yield "all leave early", Shortcut((layers - -(-layers // 4),) * T)
    if len(read) > 1:
        window = _window(read, T, T - dropped)
        kept = {t for r in read for t in range(max(0, r - window + 1), r + 1)}
        unread = [t for t in range(T) if t not in kept]
        yield "a shared window before each", Shortcut(_depths(T, layers, unread, 0))


def _depths(T: int, layers: int, left: list[int], depth: int) -> Depths:
    gone = set(left)
    return tuple(depth if t in gone else layers for t in range(T))


def _by_use(read: list[int], T: int) -> list[int]:
    """Positions from the least to the most useful: unread ones by the distance to the next read one, then read ones."""

    def ahead(t: int) -> int:
        return min((r - t for r in read if r >= t), default=2 * T)

    unread = [t for t in range(T) if t not in set(read)]
    return sorted(unread, key=ahead, reverse=True) + sorted(read, reverse=True)


def _window(read: list[int], T: int, most: int) -> int:
    """Return the largest window whose union before the read positions has at most ``most`` positions."""
    best = 1
    for window in range(1, T + 1):
        if len({t for r in read for t in range(max(0, r - window + 1), r + 1)}) > most:
            break
        best = window
    return best
