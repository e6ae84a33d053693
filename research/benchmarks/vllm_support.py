"""What vLLM runs here: formats and mixtures beside transformers, each with its residual, its law
and its verdicts.

Every case makes a small checkpoint on the spot, starts a vLLM engine of its own and proves the same
nonces as transformers does with the same checkpoint in the same dtype. On one round the noise
between the two is calibrated; on another one, with that law, each judges the other, and vLLM judges
a cheat under the honest name: the same model in four bits; in three where four are the honest
format; with half of the experts of a mixture. A case that is refused has the words of the refusal.
Rows of cases and versions that are not run again stay in the file; docs/vllm.md has the table.

    .venv-vllm/bin/python research/benchmarks/vllm_support.py -o research/results/vllm_support.json

What assay refuses only because it was not run on a kind of device is run there with `--unproven`:

    . .vllm/setup.sh; export PYTHONPATH=$PWD/src:$PYTHONPATH
    python3 research/benchmarks/vllm_support.py --device cuda --unproven \
      -o research/results/vllm_support_h200.json
"""

import asyncio
import importlib.util
import json
import os
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from _vllm import answer
from assay_research.model_cheats import with_fewer_experts
from safetensors.torch import save_file

from assay import poc
from assay.errors import AssayError
from assay.models import load_model
from assay.models.resolve import resolve
from assay.poc import HFEngine
from assay.poc.cheats import rounded
from tests.models.storing import make_hybrid, make_mixture, make_wrapper, store

PLAIN = "reference:qwen3"
RANK = 8
LORA_TARGETS = ("q_proj", "v_proj")
CHAT_TOKENS = 16
CASES = {  # kind of checkpoint, dtype
    "int8 W8A8, compressed-tensors": ("int8", "bfloat16"),
    "int4 W4A16, compressed-tensors": ("packed", "bfloat16"),
    "Qwen3-MoE": ("qwen3-moe", "bfloat16"),
    "int4 W4A16, AWQ": ("awq", "float16"),
    "int4 W4A16, GPTQ": ("gptq", "bfloat16"),
    "Mixtral": ("mixtral", "bfloat16"),
    "Qwen3-MoE in float32": ("qwen3-moe", "float32"),
    "int4 W4A16 with zeros, compressed-tensors": ("packed-zeros", "bfloat16"),
    "int8 W8A8, compressed-tensors, in float32": ("int8", "float32"),
    "not quantised": ("plain", "bfloat16"),
    "not quantised, cache in fp8": ("fp8-cache", "bfloat16"),
    "not quantised, cache in fp8, in float32": ("fp8-cache", "float32"),
    "not quantised, chat with a LoRA adapter beside": ("adapter", "bfloat16"),
    "not quantised, speculative decoding": ("speculation", "bfloat16"),
    "Falcon-H1": ("falcon_h1", "bfloat16"),
    "Granite 4, hybrid": ("granitemoehybrid", "bfloat16"),
    "LFM2": ("lfm2", "bfloat16"),
    "Nemotron-H": ("nemotron_h", "bfloat16"),
    "Qwen3-Next": ("qwen3_next", "bfloat16"),
    "SmolVLM, as text": ("smolvlm", "bfloat16"),
    "Qwen2.5-VL, as text": ("qwen2_5_vl", "bfloat16"),
    "Jamba": ("jamba", "bfloat16"),
    "int4 W4A16, compressed-tensors, in float32": ("packed", "float32"),
    "fp8 by row, compressed-tensors": ("channel-tensors", "bfloat16"),
    "fp8 by tensor": ("tensor", "bfloat16"),
    "fp8 by block of 128 x 128": ("block", "bfloat16"),
    "Qwen3-MoE, int8 W8A8, compressed-tensors": ("qwen3-moe int8", "bfloat16"),
    "Qwen3-MoE, int4 W4A16, compressed-tensors": ("qwen3-moe packed", "bfloat16"),
    "Qwen3-MoE, fp8 by tensor": ("qwen3-moe tensor", "bfloat16"),
    "Qwen3-MoE, fp8 by block of 128 x 128": ("qwen3-moe block", "bfloat16"),
}
MIXTURES = ("qwen3-moe", "mixtral")
HYBRIDS = ("falcon_h1", "granitemoehybrid", "lfm2", "nemotron_h", "qwen3_next", "jamba")
WRAPPERS = ("smolvlm", "qwen2_5_vl")
WITH_VIDEOS = ("qwen2_5_vl",)
WHOLE = ("plain", "fp8-cache", "adapter", "speculation")
OPTIONS = {
    "fp8-cache": {"kv_cache_dtype": "fp8"},
    "adapter": {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK},
    "speculation": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        }
    },
    "lfm2": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}},
}
ON_CUDA = {
    "qwen3_next": {"gdn_prefill_backend": "triton"}
}  # by itself vLLM takes a kernel of FlashInfer there
# GPUs have no kernels for heads of 32, which the small checkpoints have.
WIDER = {"head_dim": 64}
FEWER = WIDER | {"num_attention_heads": 2, "num_key_value_heads": 1}  # of the same hidden size
MODULES = ("io", "transforms", "transforms/functional", "transforms/v2", "transforms/v2/functional")
SOURCE = """
__path__ = {path!r}
__version__ = "0"


class Anything(type):
    def __getattr__(cls, name):
        return named(name)


def named(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {{}})


__getattr__ = named
"""
PRESETS = ("poc-2.0", "hardened")
SEQ_LEN = 64
NONCES = 64


def main():
    from assay.poc.vllm.compatibility import check_installed

    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE"
    )
    options_parser.add_argument("--nonces", type=int, default=NONCES)
    options_parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options_parser.add_argument(
        "--unproven", action="store_true", help="run what is refused because it was not run there"
    )
    arguments = options_parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    before = (
        json.loads(arguments.output.read_text())["rows"]
        if arguments.output and arguments.output.exists()
        else []
    )
    rows = {(row["name"], row["vllm"]): row for row in before}
    installed = check_installed()
    if arguments.unproven:
        allow(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases:
            kind, dtype = CASES[name]
            try:
                path = checkpoint(kind, Path(folder), arguments.device)
                row = measure(
                    path, kind, dtype, range(arguments.nonces), arguments.device, Path(folder)
                )
            except AssayError as error:
                row = {"refused": str(error)}
            except Exception as error:  # an engine that vLLM cannot start, or that dies
                row = {"failed": f"{type(error).__name__}: {error}"[:300]}
            rows[name, installed] = {"name": name, "vllm": installed, "asked": dtype, **row}
            note(f"{name}: {rows[name, installed]}")
            ordered = sorted(rows, key=lambda key: (list(CASES).index(key[0]), key[1]))
            publish(
                "vllm_support",
                {"seq_len": SEQ_LEN, "rows": [rows[key] for key in ordered]},
                arguments.output,
            )


def allow(device):
    """Take every format, cache and kind of layer on a device, whether it was run there or not."""
    from assay.models.number_formats import NUMBER_FORMATS
    from assay.poc.vllm import compatibility

    dtypes = ("bfloat16", "float16", "float32")
    architectures = {name for names in compatibility.WITH_STATE.values() for name in names}
    compatibility.STORED = {device: dict.fromkeys(NUMBER_FORMATS, dtypes)}
    compatibility.WITH_STATE = {device: dict.fromkeys(architectures, dtypes)}
    compatibility.EIGHT_BIT_CACHES = {device: {"fp8": ()}}
    compatibility.SHARED_EXPERTS = (device,)


def checkpoint(kind, folder, device="cpu"):
    """Make a checkpoint of a kind, once; return its directory."""
    source = resolve(PLAIN).checkpoint
    if kind in WHOLE:
        return source
    path = folder / kind
    if not path.exists():
        mixture, _, form = kind.rpartition(" ")
        if kind in MIXTURES:
            make_mixture(kind, path, **(WIDER if device == "cuda" else {}))
        elif kind in HYBRIDS:
            make_hybrid(kind, path, **(FEWER if device == "cuda" else {}))
        elif kind in WRAPPERS:
            if kind in WITH_VIDEOS:
                without_torchvision(folder)
            make_wrapper(kind, path, **(FEWER if device == "cuda" else {}))
        else:
            origin = checkpoint(mixture, folder, device) if mixture else source
            store(origin, path, form, block=128 if form == "block" else 32)
    return path


def without_torchvision(folder):
    """Let this process and those that it starts import a stand-in for torchvision, unless it is
    there.

    vLLM imports no model that reads images without it, not even to serve text alone, and its wheel
    does not load beside the torch of the CPU build. The stand-in has every name and no function: a
    model that touched an image would fail.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("", *MODULES):
        place = folder / "torchvision" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(SOURCE.format(path=[str(place)]))
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), str(folder)))
    )


def measure(path, kind, dtype, nonces=range(NONCES), device="cpu", folder=None):
    """Run one case; what it needs besides the checkpoint is made in the folder."""
    from assay.poc.vllm.vllm_engine import VLLMEngine

    shape = {"batch_size": 8, "seq_len": SEQ_LEN, "dtype": dtype}
    options = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        **OPTIONS.get(kind, {}),
    }
    if device == "cuda":  # so little, and not measured, that several of these may run side by side
        options |= {
            "gpu_memory_utilization": 0.2,
            "kv_cache_memory_bytes": 2**30,
            **ON_CUDA.get(kind, {}),
        }
    with VLLMEngine(str(path), **shape, **options) as engine:
        model = load_model(path, dtype=dtype, device=device)
        cheat = cheating(model, kind, dtype)
        results = {}
        beside = nullcontext()
        if kind == "adapter":
            beside = chat_beside(engine, make_adapter(model.module.config, folder), results)
        with beside:
            sizes = {"hidden_size": model.hidden_size}
            presets = {
                preset: compare(engine, model, cheat, preset, nonces, sizes) for preset in PRESETS
            }
        row = {
            "nonces": len(nonces),
            "fingerprint": engine.fingerprint.as_dict(),
            "presets": presets,
        }
        row |= {"chat": results} if results else {}
        return row


def cheating(model, kind, dtype):
    """Return the cheaper model that is passed off as the honest one."""
    if kind.startswith(MIXTURES):
        return with_fewer_experts(model, model.module.config.num_experts_per_tok // 2)
    if kind in (*HYBRIDS, *WRAPPERS):
        return rounded(model, 4)
    if model.quantised == "int4-groups":
        return rounded(model, 3)
    return replace(
        rounded(load_model(PLAIN, dtype=dtype, device=str(model.device)), 4), digest=model.digest
    )


def compare(engine, model, cheat, preset, nonces, told):
    """Return the residuals of a preset, the law between both engines and the verdicts with it.

    ``told`` is what `assay poc calibrate --model` reads from the model.
    """
    calibrated, fresh = (
        poc.Round(block_hash=block, public_key="k", seq_len=SEQ_LEN, preset=preset, model="m")
        for block in ("calibrated", "fresh")
    )
    ours = inside(engine, calibrated, nonces)
    theirs = beside(model, calibrated, nonces)
    calibration = poc.calibrate(ours, theirs, **told)
    residuals = np.quantile(np.abs(published(ours) - published(theirs)), [0.5, 1.0])
    judge = {"sample": len(nonces), "seed": 1, "calibration": calibration}
    mine, other_side, false = (
        inside(engine, fresh, nonces),
        *(beside(model_of_side, fresh, nonces) for model_of_side in (model, cheat)),
    )
    header = replace(
        false.header, digest=mine.header.digest, fingerprint=other_side.header.fingerprint
    )
    false = poc.Proof.build(header, false.records, false.footer.seconds)
    return {
        "residual_median": float(residuals[0]),
        "residual_max": float(residuals[1]),
        "cheat_median": float(np.median(np.abs(published(false) - published(other_side)))),
        "law": str(calibration.builds[0].law),
        "vllm_on_transformers": verdict(mine, model, **judge),
        "transformers_on_vllm": verdict(other_side, engine.model, engine=engine, **judge),
        "cheat_on_vllm": verdict(false, engine.model, engine=engine, **judge),
        "beside_the_scheduler": engine.client.direct.describe(),
    }


def inside(engine, round, nonces):
    """Prove in vLLM."""
    return poc.prove(engine.model, round, nonces, engine=engine)


def beside(model, round, nonces):
    """Prove on transformers, with the kernels that the verifier uses."""
    return poc.prove(model, round, nonces, engine=HFEngine(model, batch_size=8, seq_len=SEQ_LEN))


def published(proof):
    """Return what a proof publishes, as one array."""
    if proof.records[0].vector is None:
        return np.array([record.distance for record in proof.records])
    return np.stack([record.vector for record in proof.records]).astype(np.float64)


def verdict(proof, model, **options):
    """Return the verdict, or the reason why it cannot be given."""
    try:
        return poc.verify(
            proof, model, expect=poc.Pins(prover_dtype=proof.header.fingerprint.dtype), **options
        ).verdict
    except AssayError as error:
        return str(error)


# Chat with a LoRA adapter beside nonces: an adapter of random weights, and requests that use it
# until they end.


def make_adapter(config, folder):
    """Write an adapter for a checkpoint of this configuration; return its directory."""
    path = folder / "adapter"
    if path.exists():
        return path
    path.mkdir()
    heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name in LORA_TARGETS:
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes = {"A": (RANK, config.hidden_size), "B": (heads[name] * config.head_dim, RANK)}
            for part, shape in shapes.items():
                weight = 0.3 * torch.randn(shape, generator=draw)
                tensors[f"{place}.lora_{part}.weight"] = weight.to(torch.bfloat16)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(
        json.dumps(settings | {"target_modules": list(LORA_TARGETS)})
    )
    return path


@contextmanager
def chat_beside(engine, adapter, said):
    """Ask with the adapter, one request after the other, while the context is open.

    ``said`` gets the number of answers, how many of them are those that the adapter gave alone, and
    whether it changes what the model says at all.
    """
    from vllm.lora.request import LoRARequest

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, engine.client.loop)

    prompt = list(range(20, 52))
    used = {"lora_request": LoRARequest("adapter", 1, str(adapter))}
    plain, _ = run(answer(engine, prompt, CHAT_TOKENS)).result()
    alone, _ = run(answer(engine, prompt, CHAT_TOKENS, **used)).result()
    answers = []
    ended = asyncio.Event()

    async def ask():
        while not ended.is_set():
            answers.append((await answer(engine, prompt, CHAT_TOKENS, **used))[0])

    asking = run(ask())
    try:
        yield
    finally:
        engine.client.loop.call_soon_threadsafe(ended.set)
        asking.result()
        equal = sum(output == alone for output in answers)
        said |= {"answers": len(answers), "as_alone": equal, "changes_the_tokens": plain != alone}


if __name__ == "__main__":
    main()
