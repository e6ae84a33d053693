"""Known answers of the Gumbel numbers and of the seeds of steps, made by the numpy definition:

python -m tests.streams.gumbel_vectors        writes tests/vectors/gumbels.json again
"""

import json
from pathlib import Path

import numpy as np

from assay.streams import get_backend, seeds, step_seeds
from assay.streams.backends import digest

from .inverse import seed_for

PATH = Path(__file__).parents[1] / "vectors" / "gumbels.json"
SPLIT, ONE = round((1 - 0.5**0.5) * 2**32), round((1 - np.exp(-1)) * 2**32)
HASHES = [
    *(0, 1, 2, 3, 0xFF, 0x100, 0x7FFFFF, 0x800000, 0xFFFFFF, 0x1000000, 0x12345678),
    *(SPLIT - 1, SPLIT, SPLIT + 1, 0x7FFFFFFF, 0x80000000, ONE - 1, ONE, ONE + 1),
    *(0x9ABCDEF0, 2**32 - SPLIT, 0xFF000000, 0xFFFFFFF0, 0xFFFFFFFE, 0xFFFFFFFF),
]
TEXTS = ["", "block", "block_alpha_node_A_nonce0"]
N = 151_936
STEPS = [0, 1, 2, 3, 31, 32, 255, 65_536, 2**31 - 1, 2**31, 2**32 - 1]


def hexadecimal(words):
    return [f"{word:08x}" for word in np.asarray(words).view(np.uint32).tolist()]


def main():
    backend = get_backend("numpy")
    numbers = backend.gumbels(seed_for(HASHES, 0), 1)[:, 0]
    rows = [
        f'{{"hash": "{hash_:08x}", "gumbel": {number}, "bits": "{bits}"}}'
        for hash_, number, bits in zip(HASHES, numbers, hexadecimal(numbers), strict=True)
    ]
    streams = []
    for text in TEXTS:
        made = backend.gumbels(seeds([text]), N)
        first = hexadecimal(made[0, :8])
        streams.append(json.dumps({"text": text, "n": N, "sha256_le_f32": digest(made), "first_bits": first}))
    steps = []
    for text in TEXTS:
        words = seeds([text], strength=256)
        made = hexadecimal(step_seeds(words, STEPS)[0])
        steps.append(json.dumps({"text": text, "words": hexadecimal(words[0]), "steps": STEPS, "seeds": made}))
    parts = [f'"{name}": [\n{{}}\n]'.format(",\n".join(part)) for name, part in _named(rows, streams, steps)]
    PATH.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _named(hashes, streams, steps):
    return {"hashes": hashes, "streams": streams, "step_seeds": steps}.items()


if __name__ == "__main__":
    main()
