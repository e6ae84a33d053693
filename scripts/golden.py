"""Make proofs, artifact jobs and bases through the command line, and print the SHA-256 of every
one.

Run before and after a change that must not alter results: the two lists have to be equal. The list
of the first version is ``tests/vectors/golden_sha256.json``, and
``tests/end_to_end/test_golden.py`` compares with it.
"""

import hashlib
import json
import platform
import re
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch

MODELS = ("reference:qwen3", "reference:llama")
BLOCK = {
    "block_hash": "golden block",
    "block_height": 7,
    "public_key": "golden key",
    "node_id": 0,
    "node_count": 1,
}


def machine() -> str:
    """What the last bits of a product depend on: the processor and the version of torch."""
    model = re.search(r"model name\s*: (.*)", processor())
    return f"{model.group(1) if model else platform.processor()}, torch {torch.__version__}"


def units() -> str:
    """What the last bits of a product in bfloat16 depend on besides: virtual processors of one name
    differ in it.
    """
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in processor()), "")


def processor() -> str:
    """What Linux says of the processor; empty elsewhere."""
    return (
        Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def canonical(content: bytes) -> bytes:
    """A safetensors file with its header in the order of its keys: the library writes metadata in
    any order.
    """
    size = int.from_bytes(content[:8], "little")
    return (
        json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode() + content[8 + size :]
    )


def proofs(folder: Path, run) -> dict[str, str]:
    """Proof files of every frozen preset, without the seconds they took."""
    settings = folder / "prove.toml"
    settings.write_text("[poc.prove]\nnode_id = 1\nnode_count = 3\n", encoding="utf-8")
    found = {}
    for model in MODELS:
        for preset in run.presets:
            for dtype in ("bfloat16", "float32"):
                out = folder / "proof.jsonl"
                run(
                    "poc",
                    "prove",
                    "--model",
                    model,
                    "--preset",
                    preset,
                    "--dtype",
                    dtype,
                    "--seq-len",
                    "24",
                    "--batch-size",
                    "3",
                    "--nonces",
                    "0:7",
                    "--config",
                    settings,
                    "--block-hash",
                    "golden block",
                    "--public-key",
                    "golden key",
                    "--overwrite",
                    "-o",
                    out,
                )
                text = re.sub(rb'"seconds":[0-9.]+', b'"seconds":0', out.read_bytes())
                found[f"proof {model} {preset} {dtype}"] = sha256(text)
    return found


def bases(folder: Path, run) -> dict[str, str]:
    """Basis files of every method in float32."""
    settings = folder / "extract.toml"
    settings.write_text("[vhack.extract]\nmax_tokens = 4096\nno_cache = true\n", encoding="utf-8")
    found = {}
    for model in MODELS:
        for method in ("svd", "lda"):
            out = folder / "basis.safetensors"
            run(
                "vhack",
                "extract",
                "--model",
                model,
                "--pairs",
                "generated:8",
                "--method",
                method,
                "--top-k",
                "4",
                "--dtype",
                "float32",
                "--config",
                settings,
                "--overwrite",
                "-o",
                out,
            )
            found[f"basis {model} {method}"] = sha256(canonical(out.read_bytes()))
    return found


def jobs(folder: Path, server) -> dict[str, str]:
    """Results of artifact jobs of a running service, without their ids."""
    found = {}
    for model in MODELS:
        for dtype in ("bfloat16", "float32"):
            with server(folder / f"{model[10:]} {dtype}", model, dtype) as base:
                body = BLOCK | {
                    "nonces": [0, 1, 5, 8],
                    "batch_size": 3,
                    "wait": True,
                    "params": {"model": model, "seq_len": 24, "k_dim": 12},
                }
                request = urllib.request.Request(
                    f"{base}/api/v1/pow/generate",
                    json.dumps(body).encode(),
                    {"content-type": "application/json"},
                )
                answer = json.load(urllib.request.urlopen(request, timeout=120))
                del answer["request_id"]
                found[f"artifacts {model} {dtype}"] = sha256(
                    json.dumps(answer, sort_keys=True).encode()
                )
    return found


def tokens(frame: Path) -> dict[str, object]:
    """What ``tokens-1`` draws and publishes of nonces of the bundled Qwen3 in float32, in the frame
    of a file.

    They are kept in ``tests/vectors/tokens.json``. Vectors are compared as numbers: kernels differ
    in the last bits.
    """
    import numpy as np

    from assay import streams
    from assay.models import load_model
    from assay.poc import HFEngine, Round, get_pipeline, prove
    from assay.poc.engines.base import token_inputs
    from assay.poc.engines.hf.engine import make_transform

    model = load_model("reference:qwen3", dtype="float32", device="cpu").with_frame(frame)
    round = Round(block_hash="block_alpha", public_key="node_A", seq_len=24, preset="tokens-1")
    engine = HFEngine(model, batch_size=4, seq_len=24)
    nonces = [0, 1, 31, 4096]
    reading = make_transform(engine, round, get_pipeline("tokens-1")).reading(
        round.inputs(nonces), 24
    )
    seeds = streams.seeds(round.texts("projection", nonces, k=32))
    rows = zip(
        token_inputs(round.inputs(nonces), model.frame, seq_len=24).tolist(),
        reading.weights.int().tolist(),
        seeds.ravel().tolist(),
        streams.get_backend("numpy").normals(seeds, 32 * model.hidden_size),
        [
            record.vector
            for nonce in nonces
            for record in prove(model, round, range(nonce, nonce + 1)).records
        ],
        strict=True,
    )
    found = []
    for nonce, (ids, weights, seed, normals, vector) in zip(nonces, rows, strict=True):
        row = {"nonce": nonce, "ids": ids, "weights": weights, "projection_seed": f"{seed:08x}"}
        row |= {"projection_sha256_le_f32": sha256(normals.astype("<f4").tobytes())}
        found.append(row | {"vector": np.asarray(vector, np.float64).tolist()})
    about = {
        "block_hash": "block_alpha",
        "public_key": "node_A",
        "seq_len": 24,
        "hidden_size": model.hidden_size,
    }
    about |= {"frame_sha256": model.frame.sha256, "first_mean": model.frame.mean[:4].tolist()}
    return about | {"first_scale": model.frame.scale[:4].tolist(), "nonces": found}


def main() -> None:
    from contextlib import contextmanager

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from assay.cli import run as command
    from assay.poc.protocol.pipelines import FORWARD
    from tests.end_to_end.server import Server

    def run(*arguments: object) -> None:
        code = command([str(argument) for argument in arguments])
        if code:
            raise SystemExit(f"{arguments} ended with {code}")

    run.presets = [name for name in FORWARD if name != "hardened"]  # which may change until 1.0

    @contextmanager
    def server(folder: Path, model: str, dtype: str):
        folder.mkdir()
        started = Server(folder, "--dtype", dtype, "--seq-len", "24", model=model)
        started.start()
        try:
            started.wait_for()
            yield started.base
        finally:
            started.close()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digests = proofs(folder, run) | bases(folder, run) | jobs(folder, server)
    Path(sys.argv[1]).write_text(
        json.dumps({"machine": machine(), "units": units(), "sha256": digests}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
