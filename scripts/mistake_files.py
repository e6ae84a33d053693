"""The files that the commands of :mod:`mistake_commands` read, whole ones and broken ones."""

import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path

from mistake_commands import MODULE

from assay.models import checkpoint_directory


def prepare(folder: Path) -> None:
    """Write the files that the commands read; the proofs and the basis are real ones."""
    _compute(folder)
    text = (folder / "proof.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    agreed = (folder / "agreed.toml").read_text()
    pair = {"prompt": "p", "hack": "h", "clean": "c", "group": "g"}
    files = {
        "empty.jsonl": "",
        "truncated.jsonl": "".join(lines[:4])[: -len(lines[3]) + 10],
        "unfinished.jsonl": "".join(lines[:-1]),
        "crlf.jsonl": text.replace("\n", "\r\n"),
        "edited.jsonl": re.sub(r'"distance":.*?,"valid":\w+', '"distance":1.25,"valid":false', text, count=1),
        "future.jsonl": text.replace('"schema":1', '"schema":99', 1),
        "prompts.jsonl": json.dumps({"prompt": [1, 2, 3]}) + "\n",
        "broken.jsonl": '{"prompt": "p",\n',
        "fields.jsonl": json.dumps({name: pair[name] for name in ("prompt", "hack", "group")}) + "\n",
        "preferences.jsonl": json.dumps({"prompt": "p", "chosen": "c", "rejected": "h"}) + "\n",
        "typo.toml": '[poc.prove]\nmodle = "reference:qwen3"\n',
        "marked.jsonl": "\ufeff" + json.dumps(pair) + "\n",
        f"{MODULE}.py": "",
        "nan.jsonl": re.sub(r'"distance":[^,]+', '"distance":NaN', text, count=1),
        "twice.jsonl": text + text,
        "long.jsonl": json.dumps({"prompt": [1] * 3000}) + "\n",
        "cold.jsonl": json.dumps({"prompt": [1, 2, 3], "temperature": -1}) + "\n",
        "null.jsonl": json.dumps(pair | {"prompt": None}) + "\n",
        "nan.toml": re.sub("r_target = .*", "r_target = nan", agreed),
        "preset.toml": re.sub("preset = .*", 'preset = "poc-2"', agreed),
        "long.toml": agreed.replace("seq_len = 8", "seq_len = 99999"),
    }
    for name, content in files.items():
        (folder / name).write_text(content, newline="")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    (folder / "latin.jsonl").write_bytes(json.dumps(pair).replace("h", "é").encode("latin-1"))
    (folder / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    _break_models(folder)
    (folder / "pickle").mkdir()
    (folder / "pickle" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _break_models(folder: Path) -> None:
    """Write directories of checkpoints that lack something, all with the weights of a bundled model."""
    whole = checkpoint_directory("reference:qwen3")
    config = json.loads((whole / "config.json").read_text())
    weights = "model.safetensors"
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    checkpoints: dict[str, dict[str, object]] = {
        "bare": {"config.json": config},
        "shards": {"config.json": config, f"{weights}.index.json": index},
        "short": {"config.json": config},
        "sizes": {"config.json": config | {"hidden_size": -256}},
        "unknown": {"config.json": {"model_type": "mine"}},
        "mute": {"config.json": config},
        "garbled": {"config.json": config, "tokenizer.json": {}},
    }
    for name, files in checkpoints.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_text(json.dumps(content))
    (folder / "short" / weights).write_bytes((whole / weights).read_bytes()[:1000])
    for name in ("mute", "garbled"):
        (folder / name / weights).symlink_to(whole / weights)


def _compute(folder: Path) -> None:
    """Write two proofs of a node, the shorter one twice, pins, receipts of two models, and ledgers of other rates.

    And a basis of weights that are not of the bundle.
    """
    import torch

    from assay import load_model, poc, vhack
    from assay.poc import responses
    from assay.poc.verdict import Ledger

    model = load_model("reference:qwen3", device="cpu")
    round = poc.Round(block_hash="block_alpha", public_key="node_A", seq_len=8)
    for name, count in (("proof", 32), ("few", 8), ("theirs", 8)):
        poc.prove(model, round, range(count), output=folder / f"{name}.jsonl")
    pins = f"poc pins new --model reference:qwen3 --from-proof {folder}/proof.jsonl --public-key node_A"
    said([*shlex.split(pins), "-o", str(folder / "agreed.toml")])
    prompt = {"block_hash": "block_alpha", "public_key": "node_A", "max_tokens": 8}
    responses.respond(model, ["def add(a, b):"], **prompt, output=folder / "answers.jsonl")
    other = load_model("reference:llama", device="cpu")
    responses.respond(other, ["def add(a, b):"], **prompt, output=folder / "others.jsonl")
    (folder / "life").mkdir()
    for name in ("strict.sqlite3", "life/ledger.sqlite3"):
        Ledger(folder / name, alpha=1e-6).close()
    with torch.no_grad():
        next(iter(vhack.target_modules(model).values())).weight.mul_(2)
    vhack.extract(vhack.pairs.generate_pairs(4), model, rank=2).save(folder / "stale.safetensors")


def said(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its text on stderr."""
    from assay.cli import run

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return run(arguments), said.getvalue()
