"""Steps of TRL's trainer that generates with vLLM: with δS, gate, sources and log, against plain ones; and vLLM's bits.

One vLLM of this process (``vllm_mode="colocate"``) generates for all trainers, which take turns:

- *with*: what `assay vhack train` does, one-sided gate on the gradient, gradients of single rollouts, measures, log;
- *without*: the same adapter with plain AdamW and no log;
- *full*: TRL's trainer on all weights, without δS.

Rewards are made up. Before anything is timed, *with* takes some steps, and after each sync every weight that vLLM has
is compared with the merged one, bit by bit; a CPU packs them, so there nothing is compared.

At the end every trainer takes some steps more with a clock around its parts, which waits for the device before and
behind each: seconds per step of each part, without the parts inside of it. They add up to more than a step that is not
looked at.

    python benchmarks/vhack_vllm.py --model shape:qwen3-0.6b -o benchmarks/results/vhack_vllm_h200.json
"""

import copy
import os
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch
from _common import note, parser, publish
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.generation import vllm_generation
from vhack_training_step import LR, MadeUp, Stopwatch, axes_of

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.delta import DeltaS, Gate, ProjectedOptimizer
from assay.vhack.environment import episodes
from assay.vhack.training import TrainLog, TrainSettings
from assay.vhack.training._callback import StepLog
from assay.vhack.training._grpo import GRPO, trl_arguments

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def tokenizer_of(size):
    """One token per byte, and others that no text has, up to the vocabulary of the model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"{letters[0]}{number}" for number in range(size - len(letters)))]
    made = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=names[-1], pad_token=names[-1])


def stored(given, folder):
    """The model in a directory, from which vLLM loads it; ``small`` is one for a trial on a CPU."""
    if given.model == "small":
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
        torch.manual_seed(0)
        module = Qwen3ForCausalLM(Qwen3Config(vocab_size=320, tie_word_embeddings=True, **sizes, **heads))
    else:
        module = load_model(given.model, dtype=given.dtype, device=given.device).module
    module.save_pretrained(folder)
    tokenizer_of(module.config.vocab_size).save_pretrained(folder)
    return load_model(folder, dtype=given.dtype, device=given.device)


def runner_of(engine):
    worker = engine.llm_engine.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def one_engine(given):
    """Let TRL make one vLLM and use it for every trainer."""
    make, made = vllm_generation.LLM, []

    def shared(**settings):
        if not made:
            made.append(make(**settings, **({"enforce_eager": True} if given.eager else {})))
        return made[0]

    vllm_generation.LLM = shared
    return made


def other_bits(engine, adapter):
    """How many weights were compared, and the names of those that vLLM does not have bit by bit as they are merged."""
    theirs, rows, different = dict(runner_of(engine).model.named_parameters()), {}, {}
    for name, weight in adapter.weights():
        part = name.split(".")[-2]
        held = name.replace(part, FUSED.get(part, part))
        start = rows.get(held, 0)
        rows[held] = start + len(weight)
        different[name] = held not in theirs or not torch.equal(theirs[held].data[start : rows[held]], weight)
    return len(different), [name for name, is_other in different.items() if is_other]


def trainers(model, svd, given, folder):
    """The three trainers and their stopwatches."""
    settings = TrainSettings(
        model=given.model, steps=1 + given.steps, prompts=2, group=given.group, tasks=32, lr=LR,
        max_new_tokens=given.new_tokens, save_every=1000,
    )  # fmt: skip
    tasks, made, watches = episodes(settings.tasks, difficulty=(1, 1)), {}, {}
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def arguments(name):
        found = trl_arguments(settings, model, folder / name, ())
        found.save_strategy, found.use_vllm, found.vllm_mode = "no", True, "colocate"
        found.vllm_gpu_memory_utilization, found.vllm_max_model_length = given.share, 2048
        found.vllm_importance_sampling_correction = False  # as GRPO of assay sets it: one pass less
        return found

    for name, gate in (("with", Gate()), ("without", None)):
        adapter = DeltaS(copy.deepcopy(model.module), svd)
        inner = torch.optim.AdamW(adapter.delta, lr=LR)
        axes = axes_of(svd)
        optimiser = inner if gate is None else ProjectedOptimizer(inner, adapter, axes, gate=gate, max_norm=1.0)
        made[name] = GRPO(
            adapter, optimiser, MadeUp(tasks, settings.group), arguments(name), prompts=64 * settings.prompts,
            processing_class=model.tokenizer,
        )  # fmt: skip
        if gate is not None:
            made[name].add_callback(StepLog(made[name], TrainLog(folder / "log.jsonl", {})))
    reward = MadeUp(tasks, settings.group)
    made["full"] = GRPOTrainer(
        model=model.module, reward_funcs=[reward], args=arguments("full"), processing_class=model.tokenizer,
        train_dataset=reward.dataset(64 * settings.prompts, 0),
    )  # fmt: skip
    for name, trainer in made.items():
        trainer.remove_callback(PrinterCallback)
        watches[name] = Stopwatch(wait)
        trainer.add_callback(watches[name])
    return made, watches


def reloading(trainer):
    """On a CPU vLLM packs weights, and TRL's way to load them fails: load all of them anew."""
    generation = trainer.vllm_generation
    adapter = getattr(trainer, "adapter", None)
    weights = adapter.weights if adapter is not None else generation._iter_named_params

    def sync():
        runner_of(generation.llm).reload_weights(weights_iterator=iter(list(weights())))
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync


def checked(trainer):
    """After each sync of some steps, how many weights vLLM has and which of them are other ones."""
    generation, found = trainer.vllm_generation, []
    sync = generation.sync_weights

    def and_compare():
        sync()
        weights, different = other_bits(generation.llm, trainer.adapter)
        found.append({"weights": weights, "other_bits": different[:5], "others": len(different)})

    generation.sync_weights = and_compare
    try:
        trainer.train()
    finally:
        generation.sync_weights = sync
    return found


class Parts:
    """Seconds of parts of a step; a part inside of another one does not count as the other."""

    def __init__(self, wait):
        self.wait, self.seconds, self.open = wait, {}, []

    @contextmanager
    def part(self, name):
        """Time a block."""
        self.wait()
        begun = time.perf_counter()
        self.open.append(0.0)
        try:
            yield
        finally:
            self.wait()
            whole = time.perf_counter() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self.open.pop()
            if self.open:
                self.open[-1] += whole

    def around(self, stack, owner, method, name):
        """Put the clock around a method until the stack is closed."""
        plain, was_own = getattr(owner, method), method in vars(owner)

        def clocked(*arguments, **keywords):
            with self.part(name):
                return plain(*arguments, **keywords)

        setattr(owner, method, clocked)
        stack.callback(setattr, owner, method, plain) if was_own else stack.callback(delattr, owner, method)


def sections(trainer, steps, wait):
    """Seconds per step of the parts of a trainer's steps, the first step of the call among them."""
    parts = Parts(wait)
    with ExitStack() as stack:
        methods = [
            (trainer, "training_step", "the rest of a step"),
            (trainer, "_generate_and_score_completions", "scoring"),
            (trainer, "_compute_loss", "forward"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.vllm_generation, "sync_weights", "weights to vLLM"),
            (trainer.vllm_generation, "generate", "generation"),
        ]
        adapter, projected = getattr(trainer, "adapter", None), getattr(trainer, "projected", None)
        if adapter is not None:
            methods += [(projected, "step", "optimiser"), (adapter, "refresh", "merge")]
        if hasattr(projected, "_measured"):
            methods += [(projected, "_measured", "measures")]
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StepLog):
                methods += [
                    (callback, "on_pre_optimizer_step", "sources"),
                    (callback, "on_step_begin", "log: begin"),
                    (callback, "on_step_end", "log: end"),
                ]
        for owner, method, name in methods:
            parts.around(stack, owner, method, name)
        trainer.train()
    return {name: seconds / steps for name, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1])}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="shape:qwen3-0.6b")
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--group", type=int, default=16)
    arguments.add_argument("--new-tokens", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=4, help="timed steps of a trainer in a round")
    arguments.add_argument("--share", type=float, default=0.3, help="of the GPU's memory, for vLLM")
    arguments.add_argument("--eager", action="store_true", help="no compiling in vLLM")
    given = arguments.parse_args()
    engine = one_engine(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = stored(given, folder / "model")
        note("factors")
        svd = weight_svd(model.module)
        note("trainers")
        made, watches = trainers(model, svd, given, folder)
        note(f"{len(engine)} vLLM")
        figures = {"settings": {k: v for k, v in vars(given).items() if k != "output"}}
        if given.device == "cpu":
            for trainer in made.values():
                reloading(trainer)
        else:
            figures["syncs"] = checked(made["with"])
            publish("vhack_vllm", figures, given.output)
        for index in range(given.rounds + 1):
            note(f"round {index} of {given.rounds}")
            order = list(made.values())
            for trainer in order[index % len(order) :] + order[: index % len(order)]:  # each is first at times
                trainer.train()
            for watch in watches.values() if not index else ():
                watch.seconds.clear()
            seconds = {name: median(watch.seconds) for name, watch in watches.items() if watch.seconds}
            if seconds:
                figures |= {"step_seconds": seconds, "steps": len(watches["with"].seconds)}
                figures |= {f"with_over_{name}": seconds["with"] / seconds[name] for name in ("without", "full")}
                publish("vhack_vllm", figures, given.output)
        wait = torch.cuda.synchronize if given.device == "cuda" else lambda: None
        figures["sections"] = {name: sections(trainer, 1 + given.steps, wait) for name, trainer in made.items()}
        publish("vhack_vllm", figures, given.output)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
