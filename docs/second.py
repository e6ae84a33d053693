"""A second implementation of proofs, written from the pages beside it: streams, protocol, decode, statistics, models.

    python docs/second.py node.jsonl src/assay/models/reference/qwen3 block_alpha node_A --seed 5

A sample of the nonces is recomputed on transformers, and judged under the law of the bundled models;
`assay poc verify` with `seed = 5` in its `--config` draws the same one. Nothing of assay is imported, and one file of
its numbers is read. The place test is not made, and only block and key are pinned, not how many nonces. A reader of
receipts is at the end of responses.md.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

LAWS = Path(__file__).parents[1] / "src" / "assay" / "poc" / "verdict" / "bundled_noise.json"


class Refused(ValueError):
    """A proof or a frame that is not what was expected."""


def require(holds, otherwise):
    if not holds:
        raise Refused(otherwise)


# ---- streams.md ------------------------------------------------------------------------------------------------------
LN = (0.06971611827611923, -0.11479733884334564, 0.11685419827699661, -0.12425687164068222, 0.14249058067798615,
      -0.1666780263185501, 0.20000715553760529, -0.2499999701976776, 0.3333333134651184)  # fmt: skip
SIN = (0.004602149128913879, -0.07968021929264069, 0.6459634900093079, 0.42920368909835815)
COS = (-0.0009067399078048766, 0.02086152881383896, -0.253669410943985, 1.2337005138397217)


def seed_words(text):
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), ">u4").astype(np.uint32)


def rotated(x, bits):
    return x << np.uint32(bits) | x >> np.uint32(32 - bits)


def hashed(seed, index):
    k = rotated(
        np.atleast_1d(np.asarray(index, np.uint32)) * np.uint32(0xCC9E2D51), 15
    ) * np.uint32(0x1B873593)
    h = rotated(np.uint32(seed) ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> np.uint32(bits)) * np.uint32(factor)
    return h ^ h >> np.uint32(16)


def step_seeds(words, steps):
    for word in words:
        steps = hashed(word, steps)
    return steps


def uniforms(seed, n):
    return hashed(seed, np.arange(n)).astype(np.float32) * np.float32(2.0**-32)


def signs(seed, n):
    return np.where(hashed(seed, np.arange(n)) >= 0x80000081, 1, -1).astype(np.int8)


def permutation(seed, n):
    return np.argsort(hashed(seed, np.arange(n)), kind="stable")


def polynomial(coefficients, x):
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value


def minus_log_of(k, f):  # of 2**-k (1 + f)
    square = f * f
    curve = np.float32(0.5) * square - f * square * polynomial(LN, f)
    return ((k * np.float32(-2.12194440e-4) + curve) - f) + k * np.float32(0.693359375)


def minus_log(u):
    bits = u.view(np.int32)
    power = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    rest = (bits - (power << np.int32(23))).view(np.float32)
    return minus_log_of((-power).astype(np.float32), rest - np.float32(1))


def gumbels(seed, n):
    h = hashed(seed, np.arange(n))
    x = (np.uint32(2) * np.minimum(h, ~h) + np.uint32(1)).astype(np.float32) * np.float32(2.0**-33)
    halved = x > np.float32(0.29289323)
    upper = minus_log_of(
        halved.astype(np.float32), np.where(halved, np.float32(1) - np.float32(2) * x, -x)
    )
    return minus_log(np.where(h < 2**31, upper, minus_log(x)))


def plain_normals(seed, n):
    u1, u2 = uniforms(seed, 2 * -(-n // 2)).reshape(2, -1)
    radius = np.sqrt(np.float32(2) * minus_log(np.maximum(u1, np.float32(1e-10))))
    quarters = np.float32(4) * u2
    turns = np.rint(quarters)
    d = quarters - turns
    cosine, sine = (
        np.float32(1) - d * d * polynomial(COS, d * d),
        np.float32(2) * d - d * polynomial(SIN, d * d),
    )
    turns = turns.astype(int)
    both = np.where(turns & 1, sine, cosine), np.where(turns & 1, cosine, sine)
    negative = (turns + 1) & 2, turns & 2
    return np.concatenate(
        [radius * np.where(minus, -x, x) for minus, x in zip(negative, both, strict=True)]
    )[:n]


def normals(words, n):
    """Return n normals of one seed, or of eight: each makes an eighth, rounded up, until n are made."""
    length = max(1, -(-n // len(words)))
    parts = [
        plain_normals(word, min(length, n - start))
        for word, start in zip(words, range(0, n, length), strict=False)
    ]
    return torch.from_numpy(np.concatenate(parts))


# ---- protocol.md: from noise to a value ------------------------------------------------------------------------------
ARTIFACT = ("unit", "pick 12", "rotate 11", "unit")
PRESETS = {  # between layers, steps on the state, head, steps on the logits
    "poc-2.0": ("none", ("signs", "unit", "reflect 8"), "random", ()),
    "artifact": ("none", ARTIFACT, "none", ()),
    "tokens-1": ("none", ("unit", "project 32", "unit"), "none", ()),
    "hardened": ("none", ("unit", "project 32", "unit"), "none", ()),
    "decode": ("none", ("unit", "project 12", "unit"), "trained", ()),
    "permutation": ("none", (), "trained", ("permute",)),
    "logit-reflections": ("none", (), "trained", ("reflect 8",)),
    "logit-signs": ("none", (), "trained", ("signs",)),
    "layer-signs": ("signs", (), "trained", ()),
    "layer-signs-permutation": ("signs", (), "trained", ("permute",)),
    "hidden-reflections": ("none", ("reflect 8",), "trained", ()),
    "random-head": ("none", (), "random", ()),
    "end-normalize": ("none", ("unit",), "random", ()),
    "layer-normalize": ("normalize_reflect", ("reflect 8", "unit"), "random", ()),
    "layer-reflections": ("reflect", ARTIFACT, "none", ()),
}
PUBLISHED = {
    "inputs": "{block_hash}_{public_key}_nonce{nonce}",
    "permutation": "{block_hash}_{public_key}_nonce_{nonce}_permutations",
    "signs": "{block_hash}_{public_key}_nonce_{nonce}_signs",
    "reflection": "{block_hash}_{public_key}_nonce_{nonce}_hidden_r{index}",
    "pick": "{block_hash}_{public_key}_nonce_{nonce}_pick_{count}",
    "rotation": "{block_hash}_{public_key}_nonce_{nonce}_haar_hh_{count}_{index}",
}


def unit(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def reflected(x, v):
    return x - 2 * (x * v).sum(dim=-1, keepdim=True) * v


class Recomputation:
    """One checkpoint and one round; ``values`` gives what the preset publishes of a nonce."""

    def __init__(self, checkpoint, header, dtype, frame=None):
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype)
        ).eval()
        self.round = header["round"]
        self.preset = (
            self.round["preset"].split("-")[0]
            if "decode" in self.round["preset"]
            else self.round["preset"]
        )
        self.layers, self.hidden, self.head, self.logits = PRESETS[self.preset]
        self.steps = header["pipeline"].get("steps", 0)
        self.versioned = self.preset in ("tokens-1", "hardened", "decode")
        self.frame = read_frame(frame, header) if self.preset == "tokens-1" else None
        self.size, block = self.model.config.hidden_size, self.round["block_hash"]
        if self.head != "none" and not self.steps:
            self.weight = self.model.get_output_embeddings().weight
            if self.head == "random":
                self.weight = (
                    normals(seed_words(f"{block}_lm_head")[:1], 8192 * self.size).view(8192, -1)
                    * 0.02
                )
            target = normals(seed_words(f"{block}_target")[:1], len(self.weight))
            self.target = target / target.norm()
        for number, layer in enumerate(
            self.model.get_decoder().layers if self.layers != "none" else ()
        ):
            layer.register_forward_hook(self._between(f"{block}_layer_{number}"))

    def _between(self, text):
        v = normals(seed_words(f"{text}_householder")[:1], self.size)
        v = (v / v.norm()).to(self.model.dtype)
        s = torch.from_numpy(signs(seed_words(f"{text}_signs")[0], self.size)).to(self.model.dtype)
        change = {"signs": lambda x: x * s, "reflect": lambda x: reflected(x, v),
                  "normalize_reflect": lambda x: reflected(unit(x), v)}[self.layers]  # fmt: skip
        return lambda module, given, out: (
            (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )

    def words(self, stream, nonce, index=0, count=0):
        if not self.versioned:
            words = seed_words(
                PUBLISHED[stream].format(**self.round, nonce=nonce, index=index, count=count)
            )
            return words if stream == "inputs" and self.round["strength"] == 256 else words[:1]
        parts = (
            "assay.poc/2",
            stream,
            self.round["block_hash"],
            self.round["public_key"],
            nonce,
            index,
            count,
        )
        words = seed_words("".join(f"{len(str(part).encode())}:{part}" for part in parts))
        return words if stream in ("inputs", "prompt", "tokens", "sketch") else words[:1]

    def step(self, step, x, nonce):
        name, count = (*step.split(), "0")[:2]
        count, size = int(count), len(x)
        match name:
            case "unit":
                return unit(x)
            case "signs":
                return x * torch.from_numpy(signs(self.words("signs", nonce)[0], size))
            case "permute":
                return x[permutation(self.words("permutation", nonce)[0], size)]
            case "pick":
                return x[permutation(self.words("pick", nonce, count=count)[0], size)[:count]]
            case "project":
                return (
                    normals(self.words("projection", nonce, count=count), count * size).view(
                        count, size
                    )
                    @ x
                )
        stream, k = ("reflection", 0) if name == "reflect" else ("rotation", size)
        for index in range(count):
            v = normals(self.words(stream, nonce, index, k), size)
            x = reflected(x, v / v.norm())
        return x

    def ids(self, nonce):
        """Return the tokens of a nonce in its frame."""
        allowed = np.setdiff1d(np.arange(self.model.config.vocab_size), self.frame["left_out"])
        seeds = step_seeds(self.words("prompt", nonce), np.arange(self.round["seq_len"]))
        return allowed[
            (seeds.astype(np.uint64) * np.uint64(len(allowed)) >> np.uint64(32)).astype(int)
        ]

    def first(self):
        """Return the first position that is read."""
        return self.round["seq_len"] // (2 if self.frame else 8)

    def weights(self, nonce):
        """Return the sign of every position of a nonce, 0 where it is not read."""
        length, first = self.round["seq_len"], self.first()
        drawn = torch.from_numpy(signs(self.words("weights", nonce)[0], length)).float()
        if not self.frame:  # of two neighbours the second has the opposite sign
            drawn = torch.stack([drawn, -drawn], dim=1).flatten()
            return torch.cat([torch.zeros(first), drawn[: length - first]])
        drawn[:first] = 0
        return drawn

    @torch.inference_mode()
    def value(self, nonce):
        if self.frame:
            inputs = {"input_ids": torch.from_numpy(self.ids(nonce))[None]}
        else:
            length = self.round["seq_len"]
            noise = normals(self.words("inputs", nonce), length * self.size).view(1, length, -1)
            inputs = {"inputs_embeds": noise.to(self.model.dtype)}
        states = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0].float()
        if self.preset not in ("tokens-1", "hardened"):
            return self.published(states[-1], nonce)
        read = states[self.first() :]
        mean, scale = read.mean(dim=0), read.std(dim=0, correction=0) + 1e-8
        if self.frame:
            mean, scale = torch.tensor(self.frame["mean"]), torch.tensor(self.frame["scale"])
        return self.published(self.weights(nonce) @ unit((states - mean) / scale), nonce)

    def published(self, x, nonce):
        """Return the distance of a state that was read, or its vector in float16."""
        for step in self.hidden:
            x = self.step(step, x, nonce)
        if self.head == "none":
            return x.to(torch.float16).numpy()
        x = (self.weight @ x.to(self.weight.dtype)).float()
        for step in self.logits:
            x = self.step(step, x, nonce)
        return float((x / x.norm() - self.target).norm())

    @torch.inference_mode()
    def replay(self, nonce, tokens):
        """Return the margins of the tokens of a nonce, and its sketches."""
        weight, length = self.model.get_output_embeddings().weight, self.round["seq_len"]
        drawn = step_seeds(self.words("prompt", nonce), np.arange(length)).astype(np.uint64)
        prompt = drawn * np.uint64(self.model.config.vocab_size) >> np.uint64(32)
        ids = np.concatenate([prompt, tokens[:-1]]).astype(np.int64).clip(max=len(weight) - 1)
        output = self.model.get_decoder()(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        states = output.last_hidden_state[0, length - 1 :]
        scores = (states @ weight.T).float().numpy()
        noise = step_seeds(self.words("tokens", nonce), np.arange(self.steps))
        scores += np.stack([gumbels(seed, len(weight)) for seed in noise])
        known = tokens < len(weight)
        claimed = scores[np.arange(self.steps), np.where(known, tokens, 0)]
        margins = np.where(known, scores.max(axis=1) - claimed, np.inf)
        seeds = step_seeds(self.words("sketch", nonce), np.arange(0, self.steps, 32))
        matrices = [normals([seed], 12 * self.size).view(12, -1) for seed in seeds]
        sketches = [
            unit(p @ unit(state)) for p, state in zip(matrices, states[::32].float(), strict=True)
        ]
        return margins, torch.stack(sketches).to(torch.float16).numpy()

    def residual(self, record):
        """Return received minus recomputed distance, or how far two vectors or the tokens are apart."""
        if "distance" in record:
            return record["distance"] - self.value(record["nonce"])
        if "vector" in record:
            return float(
                np.linalg.norm(
                    decoded(record["vector"], "<f2") - self.value(record["nonce"]).astype(float)
                )
            )
        margins, sketches = self.replay(record["nonce"], decoded(record["tokens"], "<u4"))
        apart = decoded(record["sketches"], "<f2").reshape(sketches.shape) - sketches.astype(float)
        return math.sqrt((apart**2).sum(axis=1).mean() + np.minimum(margins, 4).mean())


# ---- protocol.md: the file; models.md: the digest --------------------------------------------------------------------
def decoded(text, form):
    return np.frombuffer(base64.b64decode(text, validate=True), form)


def read(path):
    """Return header and records of a proof file whose form, nonces and footer are right."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    header, *records, footer = map(json.loads, lines)
    for line, value in zip(lines, [header, *records, footer], strict=True):
        require(
            line.decode() == json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n",
            "another form",
        )
    stated = [n for run in header["nonces"] for n in range(*run)]
    require([record["nonce"] for record in records] == stated, "other nonces than the header names")
    for record in records:
        valid = "distance" not in record or record["valid"] == (
            record["distance"] < header["round"]["r_target"]
        )
        require(valid, f"nonce {record['nonce']}: valid is not what its distance says")
    wanted = {
        "records": len(records),
        "valid": sum(record.get("valid", True) for record in records),
    }
    wanted["sha256"] = hashlib.sha256(b"".join(lines[1:-1])).hexdigest()
    require(footer["footer"] | wanted == footer["footer"], "another footer")
    return header, records


def read_frame(path, header):
    """Return the arrays of a frame that is the one which a header names."""
    require(path, "a proof of tokens-1 without --frame")
    content = Path(path).read_bytes()
    require(hashlib.sha256(content).hexdigest() == header["model"]["frame"], "another frame")
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, of in json.loads(content[8:start]).items():
        if name != "__metadata__":
            low, high = of["data_offsets"]
            found[name] = np.frombuffer(
                content[start + low : start + high], {"F32": "<f4", "I32": "<i4"}[of["dtype"]]
            )
    return found


def digest(checkpoint):
    parts = {}
    for path in Path(checkpoint).glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, of in json.loads(content[8:start]).items():
            if name != "__metadata__":
                low, high = of["data_offsets"]
                head = f"{name}\n{of['dtype']}\n{of['shape']}\n".encode()
                parts[name] = hashlib.sha256(head + content[start + low : start + high]).digest()
    require(parts, f"no tensors in {checkpoint}: name the directory of a model")
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


# ---- protocol.md: the verdict ----------------------------------------------------------------------------------------
def log_density(law, sizes, multiple):
    if law["kind"] == "scale":
        half, scale = (law["dof"] + 1) / 2, multiple * law["sigma"]
        constant = (
            math.lgamma(half) - math.lgamma(law["dof"] / 2) - math.log(law["dof"] * math.pi) / 2
        )
        return constant - math.log(scale) - half * np.log1p((sizes / scale) ** 2 / law["dof"])
    z = np.abs(np.log(sizes) - law["mu"] - math.log(multiple)) / law["sd"]
    k = law["tail"]
    mass = math.sqrt(2 * math.pi) * math.erf(k / math.sqrt(2)) + 2 * math.exp(-k * k / 2) / k
    return -np.where(z < k, z * z / 2, k * (z - k / 2)) - math.log(law["sd"] * mass)


def multiples_of(law, effect):
    if law["kind"] == "scale":
        junk = law["junk_sigma"] / law["sigma"]
    else:
        a = (law["dimension"] - 1) / 2
        mean = math.lgamma(a + 0.5) + math.lgamma(2 * a) - math.lgamma(a) - math.lgamma(2 * a + 0.5)
        junk = 2 * math.exp(mean) / math.exp(law["mu"])
    near, found = max(min(16.0, junk), effect), ({5.0} if effect < 5 < junk else set())
    for low, high, factor in ((effect, near, 2), (near, junk, 4)):
        if low < high:
            found |= set(
                np.geomspace(
                    low, high, 1 + math.ceil(math.log(high / low) / math.log(factor))
                ).tolist()
            )
    return np.array(sorted(found))


def judged(residuals, law, alpha=1e-3, beta=1e-2):
    """Return the verdict of residuals in the order of their nonces, with the logarithms that decide it."""
    values = np.asarray(residuals, float)
    sizes = np.fmin(np.abs(np.where(np.isfinite(values), values, 2.0)), 2.0)
    sizes, effect = (
        (sizes, 4.0) if law["kind"] == "scale" else (np.maximum(sizes, law["floor"]), 2.0)
    )
    shares, weights = (
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0),
        (0.02, 0.02, 0.04, 0.12, 0.15, 0.2, 0.45),
    )
    multiples = multiples_of(law, effect)
    ratio = np.stack([log_density(law, sizes, m) - log_density(law, sizes, 1.0) for m in multiples])
    grown = np.expm1(np.minimum(ratio, 500))
    paths = np.stack([ratio if share == 1 else np.log1p(share * grown) for share in shares]).cumsum(
        axis=-1
    )
    start = np.log(np.array(weights) / len(multiples))[:, None, None]
    log_e = np.logaddexp.reduce((paths + start).reshape(-1, len(sizes)))
    needed, n = -math.log(beta), len(sizes)
    enough = [
        share
        for share, times in ((0.1, 1.25), (0.4, 2.5))
        if -n * math.log1p(-share) >= times * needed
    ]
    cheap = np.abs(multiples - 5).argmin()
    evidence = [
        -paths[-1, 0, -1],
        *(-paths[shares.index(share), cheap, -1] for share in enough[:1]),
    ]
    largest, least = max(0.0, float(log_e.max())), float(min(evidence))
    verdict = (
        "fraud" if largest >= -math.log(alpha) else "honest" if least >= needed else "undecided"
    )
    return {
        "verdict": verdict,
        "log_e_value": float(log_e[-1]),
        "log_e_max": largest,
        "log_evidence_honest": least,
    }


def verify(proof, checkpoint, *, block_hash, public_key, seed, sample=128, dtype=None, frame=None):
    """Return the verdict of a proof with the residuals of a sample."""
    header, records = read(proof)
    stated = header["fingerprint"]["dtype"]
    known = (header["round"]["block_hash"], header["round"]["public_key"])
    require(known == (block_hash, public_key), "another block or key")
    model = {"reference": "", "digest": digest(checkpoint), "weights": "trained", "frame": ""}
    require(header["model"] | {"reference": "", "frame": ""} == model, "another checkpoint")
    drawn = np.random.default_rng(seed).choice(
        len(records), size=min(sample, len(records)), replace=False
    )
    engine = Recomputation(checkpoint, header, dtype or stated, frame)
    residuals = [engine.residual(records[i]) for i in sorted(drawn)]
    family = "distance" if engine.head != "none" else "vector"
    if engine.versioned:
        of_decode = "tokens" if engine.steps >= 256 else "few tokens"
        family = {"hardened": "scaled vector", "tokens-1": "token vector"}.get(
            engine.preset, of_decode
        )
    law = (
        json.loads(LAWS.read_text())["laws"]
        .get(family, {})
        .get("/".join(sorted((stated, dtype or stated))))
    )
    found = (
        judged(residuals, law) if law else {"verdict": "undecided", "why": f"no law for {family}"}
    )
    return found | {"residuals": residuals}


def main():
    parser = argparse.ArgumentParser(description="Verify a proof by the pages alone.")
    for name in ("proof", "checkpoint", "block_hash", "public_key"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int, default=0, help="number that draws the sample")
    parser.add_argument("--sample", type=int, default=128)
    parser.add_argument("--dtype", help="number format here; that of the proof otherwise")
    parser.add_argument("--frame", help="frame of the checkpoint, for tokens-1")
    try:
        found = verify(**vars(parser.parse_args()))
    except (Refused, OSError, json.JSONDecodeError) as refused:
        print(f"refused: {refused}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found))
    sys.exit({"honest": 0, "fraud": 1, "undecided": 2}[found["verdict"]])


if __name__ == "__main__":
    main()
