"""Sets of vectors as a network would publish them, simulated: machines of several builds around one
truth.
"""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 12
GPUS = ("NVIDIA B200", "NVIDIA H100 80GB HBM3", "H200", "A100-SXM4-80GB", "B300_SXM6")


def truth(model: str, nonces: int, block: str = "block") -> np.ndarray:
    """Return the vectors [N, K] of a model without noise."""
    values = np.random.default_rng([ord(c) for c in model + block]).normal(size=(nonces, SIZE))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def machine(
    name: str,
    *,
    model: str = "owner/Model-A",
    gpu: str = "H100",
    of: str = "a",
    noise: float = 0.1,
    nonces: int = 400,
    bad: int = 0,
    block: str = "block",
    seed: int = 0,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one line: vectors of a machine whose distances from the truth are log-normal around
    ``noise``.

    The first ``bad`` of every 16 nonces are another's.
    """
    rng = np.random.default_rng([seed, *(ord(c) for c in name)])
    exact = truth(of, nonces, block)
    far = noise * np.exp(0.4 * rng.normal(size=(nonces, 1)))
    values = exact + far * rng.normal(size=exact.shape) / np.sqrt(SIZE)
    values[np.arange(nonces) % 16 < bad] = np.roll(exact, 1, axis=0)[np.arange(nonces) % 16 < bad]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    stated = {"model": model, "gpu": gpu, "batch_size": 16} if config is None else config
    return {
        "set": name,
        "source": "simulated",
        "config": stated,
        "block_hash": block,
        "public_key": "key",
        "seq_len": 1024,
        "k_dim": SIZE,
        "nonces": list(range(nonces)),
        "vectors": [base64.b64encode(row.astype("<f2").tobytes()).decode() for row in values],
    }


def network(machines: int = 4, *, noise: float = 0.1, nonces: int = 400) -> list[dict[str, Any]]:
    """Return honest machines of one build."""
    return [
        machine(f"2026-05__model-a-{i}", gpu=GPUS[i % len(GPUS)], noise=noise, nonces=nonces)
        for i in range(machines)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write sets, compressed where the path ends so."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path
