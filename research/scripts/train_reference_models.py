"""Train the two bundled reference models from scratch, from the Python source that is installed on
this machine.

    python research/scripts/train_reference_models.py --out DIR --seconds 165

Corpus: the standard library, and the installed packages whose metadata names a permissive licence
    and no other. Files
with the same bytes count once; generated, minified and data files are left out. A file is held out
by the hash of its *name*: other versions of a file share its name, so they cannot be on both sides
of the split.

Both models share one byte-level BPE tokenizer. Training is bounded by the clock, and the learning
rate follows the share of the time that has passed, so a run of any length ends well. Beside each
model a file of facts has the packages with their licences, how it was trained, and its loss on
files that were held out.

Shapes: B sequences, T positions, V tokens of the vocabulary, N tokens of a split.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import random
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

PAD = "<|pad|>"
BOS = "<|bos|>"
EOS = "<|eos|>"
HELD_OUT_ONE_IN = 100
SPDX = re.compile(
    r"MIT|MIT-0|MIT-CMU|BSD-[\w-]+|0BSD|BSL-1\.0|Apache-2\.0|LLVM-exception|PSF-2\.0|Python-2\.0(\.1)?|CNRI-Python"
    r"|ISC|HPND|Zlib|Unlicense|CC0-1\.0"
)
PERMISSIVE = re.compile(
    r"\b(mit|bsd|apache|psf|python software foundation|isc|hpnd|zlib|unlicense|3-clause)\b",
    re.IGNORECASE,
)
FORBIDDEN = re.compile(
    r"gpl|general public|mozilla|mpl|proprietary|nvidia|eula|commercial|creative", re.IGNORECASE
)
GENERATED = re.compile(
    r"@generated|auto-?generated|generated (by|from|with)|do not (edit|modify)", re.IGNORECASE
)


Corpus = dict[str, list[str]]
"""Texts of both splits, ``train`` and ``held_out``."""


def permissive_licence(metadata: Any) -> str | None:
    """The licence of a package if it is permissive: its SPDX expression, else its classifiers, else
    its first words.
    """
    expression = metadata.get("License-Expression")
    if expression:
        parts = [part.strip("() ") for part in re.split(r"\s+(?:AND|OR|WITH)\s+", expression)]
        either = " OR " in expression and " AND " not in expression
        good = (any if either else all)(SPDX.fullmatch(part) for part in parts)
        return expression if good else None
    names = [
        line.split(" :: ")[-1]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    names = [name for name in names if name != "OSI Approved"] or (
        metadata.get("License") or ""
    ).split("\n")[:1]
    text = "; ".join(names).strip()[:80]
    return (
        text if text and all(map(PERMISSIVE.search, names)) and not FORBIDDEN.search(text) else None
    )


def held_out(name: str) -> bool:
    """Whether a file of this name is kept from training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def readable_source(path: Path) -> str | None:
    """The text of a file that a person wrote, or None."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    longest = max(map(len, text.split("\n")))
    if not 200 <= len(text) <= 200_000 or longest > 400 or GENERATED.search(text[:1000]):
        return None
    letters = sum(map(str.isalpha, text[:20_000])) / min(len(text), 20_000)
    return text if letters > 0.35 else None


def sources() -> Iterator[tuple[str, str, str, list[Path]]]:
    """The standard library, then every permissively licensed package, with version, licence and
    Python files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.parts)
    )
    yield "Python standard library", platform.python_version(), "PSF-2.0", files
    seen = set()
    for dist in sorted(
        importlib.metadata.distributions(), key=lambda dist: str(dist.metadata["Name"]).lower()
    ):
        name = str(dist.metadata["Name"])
        licence = permissive_licence(dist.metadata)
        proprietary = name.lower().startswith(("nvidia", "cuda"))
        if licence and not proprietary and name.lower() not in seen:
            paths = [
                Path(str(dist.locate_file(file)))
                for file in dist.files or []
                if file.suffix == ".py"
            ]
            yield name, dist.version, licence, sorted(paths)
        seen.add(name.lower())


def read_corpus() -> tuple[Corpus, list[dict[str, Any]]]:
    """All texts, shuffled, each once, and the packages that they come from."""
    corpus: Corpus = {"held_out": [], "train": []}
    packages = []
    hashes = set()
    for name, version, licence, paths in sources():
        files = characters = 0
        for path in paths:
            text = readable_source(path)
            digest = hashlib.sha256((text or "").encode()).digest()
            if text is None or digest in hashes:
                continue
            hashes.add(digest)
            files = files + 1
            characters = characters + len(text)
            corpus["held_out" if held_out(path.name) else "train"].append(text)
        if files:
            package = {
                "name": name,
                "version": version,
                "licence": licence,
                "files": files,
                "characters": characters,
            }
            packages.append(package)
    for texts in corpus.values():
        random.Random(0).shuffle(texts)
    return corpus, packages


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE: any text survives encoding and decoding, and no token is added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=every_byte,
        show_progress=False,
    )
    sample = texts[: max(1, int(len(texts) * min(1.0, 60e6 / sum(map(len, texts)))))]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], seconds: float) -> tuple[Tensor, int]:
    """Tokens [N] int16, each text closed by EOS, and their number of characters; stops when the
    time is over.
    """
    tokenizer.encode_special_tokens = (
        True  # inside a source file "<|eos|>" is seven characters of text
    )
    end = [tokenizer.token_to_id(EOS)]
    parts = []
    characters = 0
    deadline = time.monotonic() + seconds
    for start in range(0, len(texts), 512):
        batch = texts[start : start + 512]
        parts += [
            np.array(encoding.ids + end, dtype=np.int16)
            for encoding in tokenizer.encode_batch_fast(batch)
        ]
        characters += sum(map(len, batch))
        if time.monotonic() > deadline:
            break
    tokenizer.encode_special_tokens = False
    return torch.from_numpy(np.concatenate(parts)), characters


def new_model(name: str, tokenizer: Tokenizer, size: argparse.Namespace) -> PreTrainedModel:
    """A freshly initialised model in float32."""
    shape = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": max(1, size.hidden // 128),
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    factory: Any = transformers.AutoModelForCausalLM
    model: PreTrainedModel = factory.from_config(transformers.AutoConfig.for_model(name, **shape))
    return model


def next_token_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean negative log likelihood in nats of every token given those before it."""
    with torch.autocast(tokens_BT.device.type, torch.bfloat16):
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def draw_batch(stream_N: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows [B, T + 1] from random places of the stream, which lies on the device."""
    starts = torch.randint(
        len(stream_N) - length - 1, (batch, 1), generator=generator, device=stream_N.device
    )
    return stream_N[starts + torch.arange(length + 1, device=stream_N.device)].long()


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2 % of the time, then a cosine down to a hundredth of the peak."""
    warm = min(1.0, (progress + 1e-3) / 0.02)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: PreTrainedModel, stream_N: Tensor, size: argparse.Namespace) -> dict[str, Any]:
    """AdamW on random windows until the time is over, compilation included."""
    start = time.monotonic()
    generator = torch.Generator(stream_N.device).manual_seed(1)
    decays = ((0.1, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim == 1))  # norms do not decay
    groups = [
        {"params": list(filter(kind, model.parameters())), "weight_decay": decay}
        for decay, kind in decays
    ]
    optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), fused=stream_N.is_cuda)
    loss_of: Callable[[nn.Module, Tensor], Tensor] = (
        torch.compile(next_token_loss) if size.compile else next_token_loss
    )
    torch.autograd.backward(
        loss_of(model, draw_batch(stream_N, size.batch, size.length, generator))
    )
    model.zero_grad(set_to_none=True)
    warm = time.monotonic()
    step = 0
    while (now := time.monotonic()) < start + size.seconds:
        progress = (now - warm) / (start + size.seconds - warm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, size.lr)
        loss = loss_of(model, draw_batch(stream_N, size.batch, size.length, generator))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if (
            step % 8 == 0
        ):  # wait for the device, so that the clock is about work done, not work queued
            line = f"{step} {now - start:.1f} {loss.item():.4f}"
            print(line, end="\n" if step % 200 == 0 else "\r", flush=True)
    tokens = step * size.batch * size.length
    seconds = round(time.monotonic() - start, 1)
    return {"steps": step, "tokens_trained_on": tokens, "seconds": seconds}


@torch.inference_mode()
def measure(
    model: PreTrainedModel, stream_N: Tensor, characters: int, length: int
) -> dict[str, float]:
    """Loss of the model as shipped on consecutive windows of a held-out stream, beside two unigram
    baselines.
    """
    windows = stream_N[: (len(stream_N) - 1) // length * length + 1].long()
    starts = torch.arange(0, len(windows) - 1, length, device=windows.device)
    total = 0.0
    count = len(windows) - 1
    for chunk in torch.split(starts, 64):
        tokens_BT = windows[chunk[:, None] + torch.arange(length + 1, device=windows.device)]
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits.float()
        total += functional.cross_entropy(
            logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum"
        ).item()
    loss = total / count
    share = torch.bincount(windows[1:]).double() / count
    entropy = -(share[share > 0] * share[share > 0].log()).sum().item()
    return {
        "held_out_tokens": count,
        "loss_nats_per_token": loss,
        "bits_per_character": loss * len(stream_N) / characters / math.log(2),
        "unigram_entropy_nats": entropy,
        "nats_below_unigram": entropy - loss,
    }


def make_model(
    name: str, tokenizer: Tokenizer, data: dict[str, Any], size: argparse.Namespace
) -> None:
    """Train, save as bfloat16, measure what was saved, and write the facts."""
    model = new_model(name, tokenizer, size).to(size.device)
    history = train(model, data["train"], size)
    folder = size.out / name
    model.to(torch.bfloat16).save_pretrained(folder)
    wrapper: Any = transformers.PreTrainedTokenizerFast
    options = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "model_max_length": 2048}
    wrapper(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options
    ).save_pretrained(folder)
    shipped = type(model).from_pretrained(folder, dtype=torch.bfloat16).to(size.device).eval()
    measured = measure(shipped, data["held_out"], data["held_out_characters"], size.length)
    facts = {
        "command": size.command,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_files": data["train_files"],
        "corpus_characters": data["train_characters"],
        "corpus_tokens": len(data["train"]),
        "held_out_files": data["held_out_files"],
        **measured,
        "window": size.length,
        **history,
        "device": torch.cuda.get_device_name() if size.device == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": [platform.python_version(), torch.__version__, transformers.__version__],
        "packages": data["packages"],
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), "utf-8")
    print(name, measured, flush=True)


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write qwen3/ and llama/ into"
    )
    parser.add_argument("--seconds", type=float, default=165, help="training time of each model")
    parser.add_argument(
        "--encode-seconds", type=float, default=80, help="most time to spend on encoding the corpus"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    full = {"hidden": 256, "layers": 8, "vocab": 4096, "batch": 256, "length": 512, "lr": 3e-3}
    args = parser.parse_args(namespace=argparse.Namespace(**full))
    args.command = (
        f"python research/scripts/train_reference_models.py --out DIR --seconds {args.seconds:g}"
    )
    return args


def main() -> None:
    """Corpus, tokenizer, both models."""
    size = settings()
    size.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    begin = time.monotonic()
    corpus, packages = read_corpus()
    tokenizer = train_tokenizer(corpus["train"], size.vocab)
    print(
        f"{time.monotonic() - begin:.0f} s: {len(corpus['train'])} files, tokenizer trained",
        flush=True,
    )
    data: dict[str, Any] = {"packages": packages}
    for split, texts in corpus.items():
        data[f"{split}_files"] = len(texts)
        tokens, data[f"{split}_characters"] = encode(tokenizer, texts, size.encode_seconds)
        data[split] = tokens.to(size.device)
        print(f"{time.monotonic() - begin:.0f} s: {split} {len(tokens)} tokens", flush=True)
    for name in ("qwen3", "llama"):
        make_model(name, tokenizer, data, size)
        torch.compiler.reset()
        print(f"{time.monotonic() - begin:.0f} s: {name} done", flush=True)


if __name__ == "__main__":
    main()
