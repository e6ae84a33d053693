"""The numbers of docs/protocol.md and docs/streams.md are those of the code, and so is the place test."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as distributions

from assay.poc import PIPELINES, Fingerprint, Round
from assay.stats import place_test
from assay.stats.sequential import _SHARE_WEIGHTS, SHARES
from assay.streams import definition as _definition

DOCS = Path(__file__).parents[2] / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")
STREAMS = (DOCS / "streams.md").read_text(encoding="utf-8")


def row(page: str, first: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {first} |"))


@pytest.mark.parametrize("name", ["LN", "SIN", "COS"])
def test_coefficients(name: str):
    wanted = [float(c) for c in getattr(_definition, f"{name}_POLY")]
    found = re.findall(r"[−]?\d\.\d+", row(STREAMS, name))
    assert [np.float32(number.replace("−", "-")) for number in found] == wanted


def test_weights_of_the_shares():
    shares = [float(number) / 100 for number in re.findall(r"([\d.]+) %", row(PROTOCOL, "π"))]
    weights = [float(number) for number in re.findall(r"[\d.]+", row(PROTOCOL, "weight"))]
    assert shares == pytest.approx(SHARES)
    assert weights == _SHARE_WEIGHTS.tolist()


def test_keys_of_the_header():
    for name, wanted in (
        ("`round`", list(Round.__dataclass_fields__)),
        ("`fingerprint`", [field for field in Fingerprint.__dataclass_fields__ if field != "kernels"]),
        ("`pipeline`", [*PIPELINES["poc-2.0"].as_dict(), "texts", "steps"]),
    ):
        assert re.findall(r"`(\w+)`", row(PROTOCOL, name))[1:] == wanted


def test_seed_texts_of_the_hardened_preset():
    round = Round(block_hash="block_alpha", public_key="node_A", preset="hardened")
    assert f"`{round.text('inputs', 7)}`" in PROTOCOL
    assert f"`{round.text('projection', 7, k=12)}`" in PROTOCOL


def p_of(sizes, positions, batch):
    """The smallest p-value of the page's sets, written from the page."""
    n, end = len(sizes), int(positions.max()) + 1
    order = np.sort(sizes)[::-1]

    def p(inside, wanted):
        large_N = sizes > order[wanted] if 0 < wanted < n else np.zeros(n, bool)
        held, large, h = int(inside.sum()), int(large_N.sum()), int((inside & large_N).sum())
        r = (large - h) * (held - h) / ((h + 1) * (n - large - held + h + 1))
        return distributions.hypergeom.pmf(h, n, large, held) / (1 - r) if r < 1 else 1.0

    moduli = {2, 4, 8, 16, 32, 64} | {d for d in range(2, 257) if batch % d == 0} | {batch * k for k in (1, 2, 3, 4, 8)}
    kept = []
    for m in (m for m in moduli if 2 <= m <= 256):
        firsts, most = range(0, m, -(-m // 64)), m // 2
        kept.append(
            min(
                p((positions - first) % m < length, round(n * length / m))
                * (2 * most * (len(firsts) - 1 if first else 1))
                for length in range(1, most + 1)
                for first in firsts
            )
        )
    parts = [(end * i // 8, end * j // 8) for i in range(8) for j in (i + 2, i + 3, i + 4) if j <= 8]
    parts += [(0, count) for count in (1, 2, 4, 8, 16, 32, 64) if count == 1 or 2 * count <= end]
    inside = [(positions >= low) & (positions < high) for low, high in parts]
    kept.append(min(p(part, int(part.sum())) for part in inside) * len(parts))
    return min(1.0, min(kept) * len(kept))


@pytest.mark.parametrize(("bad", "batch"), [(None, 8), (3, 12), (8, 16), ("late", 8)])
def test_place_test(bad, batch: int):
    rng = np.random.default_rng(1)
    positions = np.sort(rng.choice(200, 90, replace=False))
    sizes = np.exp(rng.normal(size=90))
    where = positions > 150 if bad == "late" else positions % batch < (bad or 0)
    sizes[where] *= 8
    found = place_test(sizes, positions, batch_size=batch, honest_size=1.0)
    assert found.p_value == pytest.approx(p_of(sizes, positions, batch), rel=1e-6)
    assert (found.p_value < 1e-4) == (bad is not None) == found.faulty
