"""A node of your own: what `tokens-1` publishes, computed without assay.

    python examples/own_node.py CHECKPOINT frame.safetensors block_alpha node_A 24 4

It prints one record of a proof file for each nonce. The pages streams.md and protocol.md define
every step; the docstrings name the sections.
"""

import base64
import hashlib
import json
import sys

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

LOG = (0.06971611827611923, -0.11479733884334564, 0.11685419827699661, -0.12425687164068222)
LOG += (0.14249058067798615, -0.1666780263185501, 0.20000715553760529, -0.2499999701976776)
LOG += (0.3333333134651184,)
SINE = (0.004602149128913879, -0.07968021929264069, 0.6459634900093079, 0.42920368909835815)
COSINE = (-0.0009067399078048766, 0.02086152881383896, -0.253669410943985, 1.2337005138397217)
WIDTH = 32  # numbers of a vector


def seed_words(stream, nonce, block, key, count=0):
    """Return the eight words of a seed (protocol.md, "The preset of tokens")."""
    parts = ("assay.poc/2", stream, block, key, nonce, 0, count)
    text = "".join(f"{len(str(part).encode())}:{part}" for part in parts)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), ">u4").astype(np.uint32)


def rotated(x, bits):
    """Rotate words to the left."""
    return x << np.uint32(bits) | x >> np.uint32(32 - bits)


def hashed(seed, index):
    """Return MurmurHash3 of indices (streams.md, "The format")."""
    k = rotated(np.asarray(index, np.uint32) * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    h = rotated(np.uint32(seed) ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> np.uint32(bits)) * np.uint32(factor)
    return h ^ h >> np.uint32(16)


def polynomial(coefficients, x):
    """Evaluate a polynomial in float32, the highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value


def minus_log(u):
    """Return -ln(u) by additions and multiplications alone (streams.md, "The format")."""
    bits = u.view(np.int32)
    power = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (bits - (power << np.int32(23))).view(np.float32) - np.float32(1)
    k = (-power).astype(np.float32)
    curve = np.float32(0.5) * f * f - f * (f * f) * polynomial(LOG, f)
    return ((k * np.float32(-2.12194440e-4) + curve) - f) + k * np.float32(0.693359375)


def normals(seed, n):
    """Return n (even) normal numbers of a seed (streams.md, "The format")."""
    u1, u2 = (hashed(seed, np.arange(n)).astype(np.float32) * np.float32(2.0**-32)).reshape(2, -1)
    radius = np.sqrt(np.float32(2) * minus_log(np.maximum(u1, np.float32(1e-10))))
    turns = np.rint(np.float32(4) * u2)
    d = np.float32(4) * u2 - turns
    cosine = np.float32(1) - d * d * polynomial(COSINE, d * d)
    sine = np.float32(2) * d - d * polynomial(SINE, d * d)
    turns = turns.astype(int)
    x = radius * np.where(turns & 1, sine, cosine) * np.where((turns + 1) & 2, -1, 1)
    y = radius * np.where(turns & 1, cosine, sine) * np.where(turns & 2, -1, 1)
    return torch.from_numpy(np.concatenate([x, y]).astype(np.float32))


def unit(x):
    """Scale a vector to length 1."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


@torch.inference_mode()
def vector(decoder, frame, nonce, block, key, length):
    """Return what a node publishes for a nonce: 32 numbers in float16."""
    steps = np.arange(length)
    for word in seed_words("prompt", nonce, block, key):
        steps = hashed(word, steps)
    allowed = np.setdiff1d(np.arange(decoder.config.vocab_size), frame["left_out"])
    places = steps.astype(np.uint64) * np.uint64(len(allowed)) >> np.uint64(32)
    ids = torch.from_numpy(allowed[places.astype(int)])
    states = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0].float()
    framed = unit((states - frame["mean"]) / frame["scale"])
    words = hashed(seed_words("weights", nonce, block, key)[0], np.arange(length))
    signs = torch.from_numpy(np.where(words >= 0x80000081, 1, -1)).float()
    signs[: length // 2] = 0  # only the second half is read
    size = len(frame["mean"])
    seed = seed_words("projection", nonce, block, key, WIDTH)[0]
    projection = normals(seed, WIDTH * size).view(WIDTH, size)
    return unit(projection @ unit(signs @ framed)).to(torch.float16).numpy()


def main():
    checkpoint, frame_file, block, key, length, nonces = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with safe_open(frame_file, "pt") as file:
        frame = {name: file.get_tensor(name) for name in ("left_out", "mean", "scale")}
    for nonce in range(int(nonces)):
        numbers = vector(model.get_decoder(), frame, nonce, block, key, int(length))
        text = base64.b64encode(numbers.astype("<f2").tobytes()).decode()
        print(json.dumps({"nonce": nonce, "vector": text}, separators=(",", ":")))


if __name__ == "__main__":
    main()
