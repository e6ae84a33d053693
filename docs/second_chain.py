"""The chain's decode proof by the page beside it (decode.md), after second.py. Nothing of assay is imported.

    python docs/second_chain.py proof.jsonl src/assay/models/reference/qwen3

Every nonce is run again, first step by step as a prover does and then along the points that the proof states. A line
has the nonce, how many points differ when it runs by itself, and the largest margin along the stated points.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from second import decoded, hashed, normals, permutation, read, reflected, seed_words, unit
from transformers import AutoModelForCausalLM, DynamicCache

FILE = Path(__file__).parents[1] / "src" / "assay" / "poc" / "protocol" / "sphere_points.f32"
PREVIOUS, STEP = 0x9E3779B1, 0x85EBCA77
INPUT, PICK = 0x0D, 0x91


def step_seed(base, previous, step, salt):
    return int(hashed(base, (previous * PREVIOUS + step * STEP + salt) % 2**32)[0])


def coordinates(seed, size):
    chosen = permutation(seed, size)[:256]
    return [*sorted(chosen[:-1]), chosen[-1]]


class Chains:
    """One checkpoint and one round."""

    def __init__(self, checkpoint, round, dtype="float32"):
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = loaded.eval().get_decoder()
        self.dtype, self.size = loaded.dtype, loaded.config.hidden_size
        self.key = f"{round['block_hash']}_{round['public_key']}"
        self.prompt = round["seq_len"]
        self.points = torch.from_numpy(np.fromfile(FILE, "<f4").reshape(16, 256))
        for number, layer in enumerate(self.model.layers):
            text = f"{round['block_hash']}_layer_{number}_householder"
            v = normals(seed_words(text)[:1], self.size)
            v = (v / v.norm()).to(self.dtype)
            layer.register_forward_hook(lambda module, given, out, v=v: reflected(out, v))

    def base(self, nonce):
        return seed_words(f"{self.key}_nonce{nonce}")[0]

    def input(self, nonce, step, previous):
        """Return the inputs of the prompt, for step 0, or the one of another step."""
        seed = self.base(nonce) if step == 0 else step_seed(self.base(nonce), previous, step, INPUT)
        count = self.prompt if step == 0 else 1
        return normals([seed], count * self.size).view(1, count, self.size).to(self.dtype)

    def picked(self, nonce, step, previous):
        if step:
            return coordinates(step_seed(self.base(nonce), previous, step, PICK), self.size)
        first = seed_words(f"{self.key}_nonce_{nonce}_pick_256_decode0")[0]
        return coordinates(first, self.size)

    @torch.inference_mode()
    def run(self, nonce, steps, stated=None):
        """Return the points of a chain, and the margins of the stated ones."""
        cache, previous, points, margins = DynamicCache(), 0, [], []
        for step in range(steps + 1):
            given = self.input(nonce, step, previous)
            state = self.model(inputs_embeds=given, past_key_values=cache).last_hidden_state[0, -1]
            read = unit(unit(state.float())[self.picked(nonce, step, previous)])
            scores = self.points @ read
            points.append(int(scores.argmax()))
            previous = points[-1] if stated is None else int(stated[step])
            margins.append(float(scores.max() - scores[previous]))
        return np.array(points), np.array(margins)


def main():
    proof, checkpoint = sys.argv[1:]
    header, records = read(proof)
    chains = Chains(checkpoint, header["round"], header["fingerprint"]["dtype"])
    steps = header["pipeline"]["steps"]
    for record in records:
        stated = decoded(record["points"], "u1")
        free, _ = chains.run(record["nonce"], steps)
        _, margins = chains.run(record["nonce"], steps, stated)
        print(record["nonce"], int((free != stated).sum()), margins.max())


if __name__ == "__main__":
    main()
