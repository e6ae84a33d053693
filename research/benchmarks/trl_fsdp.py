r"""TRL's GRPOTrainer with a guard that takes a penalty from what cin-lda flags: one process, and a
model that FSDP2 divides over several, step by step.

    OMP_NUM_THREADS=1 python research/benchmarks/trl_fsdp.py -o research/results/trl_fsdp.json
    python research/benchmarks/trl_fsdp.py --device cuda --prompts 8 --group 8 --new-tokens 96 \
      -o OUTPUT

Every run has the same weights, prompts, seeds and global batches. A token is drawn from the policy
of its run by noise that belongs to seed, step, row of the global batch and place alone, so runs
draw the same completions as long as their probabilities are the same. All train on what ``one``
drew: rounding alone draws another token sooner or later, and from there any two runs part. What
they would have drawn otherwise is counted. The first rollout of each group is a stored exploit. The
reward is how much of the exploit or of the honest answer a completion repeats, whichever is more:
without a penalty the exploit pays best. All weights are trained, and the detector looks at the
policy of now.

Runs: ``one`` process; ``halves``, one process that takes each batch in two parts, which is what
rounding alone changes; ``fsdp``, the processes; ``watch``, one process that only watches, which
shows that a difference would be seen.

Said before a run of more than three steps: ``fsdp`` has the same flags as ``one`` in every step,
its rewards and its losses differ by at most 0.001, its weights have moved apart by at most 5 % of
the way that they went; ``watch`` breaks at least two of the four. Said after runs of 20 steps that
drew by sums of probabilities, whose 4096 ends are all rounded, so that ``halves`` drew its first
other token in step 12: at most 1 % of the completions of ``fsdp`` are drawn otherwise.
"""

import os
import socket
import tempfile
from dataclasses import fields
from difflib import SequenceMatcher
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing
from _common import note, parser, publish, round_to, timed
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from assay.models import load_model
from assay.vhack.detectors import fit_judge
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.environment.grading import episodes
from assay.vhack.pairs.generate import environment_pairs
from assay.vhack.training import Guard
from tests.vhack.training.test_guard_divided import divided_on_cpus

RUNS = ("one", "fsdp", "halves", "watch")
LIMITS = {"drawn": 0.01, "flags": 0, "reward": 1e-3, "loss": 1e-3, "moved": 0.05}
LOGGED = ("loss", "reward", "grad_norm", "vhack/flagged")
MANY = 10_000  # rows of a batch at most, and steps


class Drawn(LogitsProcessor):
    """Leave of each row the token whose logit is largest with noise of Gumbel added, [B, T, V]."""

    def __init__(self, noise_BTV):
        self.noise_BTV = noise_BTV
        self.place = 0

    def __call__(self, input_ids, scores):
        """Return 0 for the token that is drawn and −∞ for others, [B, V]."""
        noisy_BV = scores.double() + self.noise_BTV[:, self.place].to(scores.device)
        self.place += 1
        tokens_B = noisy_BV.argmax(dim=1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B, 0.0)


class Noted(RolloutJudge):
    """A detector that keeps the scores of every call."""

    @classmethod
    def of(cls, judge):
        """Return a copy of a detector that keeps its scores in ``noted``."""
        copy = cls(**{field.name: getattr(judge, field.name) for field in fields(judge)})
        # The class is frozen.
        object.__setattr__(copy, "noted", [])
        return copy

    def scores(self, samples):
        """Return the scores, and keep them."""
        scores = super().scores(samples)
        self.noted.append(scores)
        return scores


class Curve(TrainerCallback):
    """Keeps what TRL logs, and the norm of all weights, after every step."""

    def __init__(self):
        self.lines = []
        self.norms = []

    def on_log(self, args, state, control, logs, **_):
        """Keep the numbers that are compared."""
        if "loss" in logs:
            self.lines.append({name: float(logs[name]) for name in LOGGED})

    def on_step_end(self, args, state, control, model, **_):
        """Keep the norm."""
        squares = [whole(value).double().square().sum() for value in model.parameters()]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


def whole(parameter):
    """Return the whole of a parameter, for which all processes ask together."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def by_likeness(completions, exploit, honest, **_):
    """Return how much of the exploit or the honest answer each completion repeats."""
    return [
        max(SequenceMatcher(None, text, answer).ratio() for answer in answers)
        for text, *answers in zip(completions, exploit, honest, strict=True)
    ]


def draw(chosen, tokenizer, exploits, texts, replayed):
    """Return the ``rollout_func`` of TRL; what it draws is added to ``texts``, a list a step.

    What is ``replayed``, of all rows by step, is trained on in its place.
    """
    generation = GenerationConfig(
        max_new_tokens=chosen.new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    @torch.no_grad()
    def rollout(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        rows = range(first, first + len(prompts))
        seed = (chosen.seed * MANY + trainer.state.global_step) * MANY
        shape = (chosen.new_tokens, trainer.model.config.vocab_size)
        noise = [
            -torch.empty(shape, dtype=torch.float64)
            .exponential_(generator=torch.Generator().manual_seed(seed + row))
            .log()
            for row in rows
        ]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        encoded = encoded.to(trainer.accelerator.device)
        sampled = trainer.model.generate(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            generation_config=generation,
            logits_processor=LogitsProcessorList([Drawn(torch.stack(noise))]),
            synced_gpus=trainer.accelerator.num_processes > 1,
        )
        completions = []
        start = encoded.input_ids.shape[1]
        for row, prompt, tokens in zip(rows, prompts, sampled[:, start:].tolist(), strict=True):
            if row % chosen.group == 0:
                tokens = [*tokenizer(exploits[prompt])["input_ids"], tokenizer.eos_token_id]
            end = tokenizer.eos_token_id
            length = tokens.index(end) + 1 if end in tokens else len(tokens)
            completions.append(tokens[:length])
        texts.append(completions)
        if replayed:
            completions = [replayed[trainer.state.global_step][row] for row in rows]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": None,
        }

    return rollout


def configured(chosen, run, count, folder):
    """Return TRL's settings of a run in so many processes."""
    parts = count * (2 if run == "halves" else 1)
    divided = {"fsdp": True, "fsdp_config": {"version": 2}} if run == "fsdp" else {}
    if run == "fsdp" and chosen.device == "cpu":
        divided["ddp_backend"] = "gloo"
    return GRPOConfig(
        folder,
        max_steps=chosen.steps,
        seed=chosen.seed,
        num_generations=chosen.group,
        per_device_train_batch_size=chosen.prompts * chosen.group // parts,
        gradient_accumulation_steps=parts // count,
        max_completion_length=chosen.new_tokens,
        learning_rate=chosen.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        gradient_checkpointing=False,
        bf16=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=chosen.device == "cpu",
        **divided,
    )


def train(rank, chosen, run, count, port, folder):
    """Train in one process of a run, and leave its curve in the folder."""
    if count > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    device = f"cuda:{rank}" if chosen.device == "cuda" else "cpu"
    if chosen.device == "cuda":
        torch.cuda.set_device(device)
    model = load_model(chosen.model, dtype="float32", device=device)
    module = model.module
    tasks = episodes(chosen.steps * chosen.prompts, difficulty=(1, 1))
    table = [
        {
            "prompt": task.prompt,
            "exploit": task.completion(task.exploit()),
            "honest": task.completion(task.task.source()),
        }
        for task in tasks
    ]
    exploits = {line["prompt"]: line["exploit"] for line in table}
    file = Path(folder, "one-0.pt")
    replayed = torch.load(file, weights_only=True)["texts"] if run != "one" else []
    # Before the model is divided: every process fits the detector of the whole one.
    judge = Noted.of(fit_judge(environment_pairs(chosen.pairs, whole=True), model))
    with divided_on_cpus():
        config = configured(chosen, run, count, f"{folder}/{run}")
        config._n_gpu = 1  # with several, TRL would copy the model to each
        texts = []
        trainer = GRPOTrainer(
            model=module,
            reward_funcs=[by_likeness],
            args=config,
            train_dataset=Dataset.from_list(table),
            processing_class=model.tokenizer,
            rollout_func=draw(chosen, model.tokenizer, exploits, texts, replayed),
            callbacks=[curve := Curve()],
        )
        trainer.remove_callback(PrinterCallback)
        Guard(judge, "watch" if run == "watch" else "penalty").attach(trainer)
        before = {name: value.detach().cpu().clone() for name, value in module.named_parameters()}
        seconds, _ = timed(trainer.train)
    after = {name: whole(value).cpu() for name, value in module.named_parameters()}
    result = {
        "lines": curve.lines,
        "norms": curve.norms,
        "scores": judge.noted,
        "texts": texts,
        "flags": [[score > judge.threshold.value for score in step] for step in judge.noted],
        "divided": sum(isinstance(value, DTensor) for value in module.parameters()),
        "way": torch.cat([(after[name] - before[name]).flatten() for name in after]),
        "seconds": seconds,
    }
    torch.save(result, f"{folder}/{run}-{rank}.pt")
    if count > 1:
        dist.destroy_process_group()


def start(chosen, run, folder):
    """Do a run in processes of its own, and return what they found, of all rows."""
    count = chosen.processes if run == "fsdp" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (chosen, run, count, port, folder), nprocs=count)
    parts = [torch.load(f"{folder}/{run}-{rank}.pt", weights_only=True) for rank in range(count)]
    result = SimpleNamespace(**parts[0])
    for name in ("scores", "flags", "texts"):  # of each step, those of the first process first
        steps = zip(*(part[name] for part in parts), strict=True)
        setattr(result, name, [list(chain.from_iterable(step)) for step in steps])
    return result


def side_by_side(mine, theirs):
    """Return the pairs of values of each step."""
    return [list(zip(a, b, strict=True)) for a, b in zip(mine, theirs, strict=True)]


def compared(mine, theirs):
    """Return how far a run is from another, step by step and in all."""
    pairs = list(zip(mine.lines, theirs.lines, strict=True))
    apart = {name: [abs(a[name] - b[name]) for a, b in pairs] for name in LOGGED}
    apart["norm"] = [abs(a - b) / b for a, b in zip(mine.norms, theirs.norms, strict=True)]
    scores = side_by_side(mine.scores, theirs.scores)
    apart["score"] = [max(abs(x - y) for x, y in step) for step in scores]
    flags = side_by_side(mine.flags, theirs.flags)
    apart["flags"] = [sum(x != y for x, y in step) for step in flags]
    texts = side_by_side(mine.texts, theirs.texts)
    apart["drawn"] = [sum(x != y for x, y in step) for step in texts]
    sizes = {
        "drawn": sum(apart["drawn"]) / sum(map(len, mine.texts)),
        "flags": sum(apart["flags"]),
        "reward": max(apart["reward"]),
        "loss": max(apart["loss"]),
        "moved": float((mine.way - theirs.way).norm() / theirs.way.norm()),
    }
    held = {name: size <= LIMITS[name] for name, size in sizes.items()}
    return {
        "same_curve": all(held.values()),
        "held": held,
        "sizes": {name: round_to(size, 3) for name, size in sizes.items()},
        "largest": {name: round_to(max(steps), 3) for name, steps in apart.items()},
        "by_step": {name: [round_to(x, 3) for x in steps] for name, steps in apart.items()},
    }


def main():
    """Do every run, and compare each with the first."""
    options = parser(__doc__)
    options.add_argument("--model", default="reference:qwen3")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for flag, default in (
        ("processes", 2),
        ("steps", 20),
        ("prompts", 2),
        ("group", 4),
        ("new-tokens", 24),
        ("pairs", 24),
        ("seed", 1),
    ):
        options.add_argument(f"--{flag}", type=int, default=default)
    options.add_argument("--lr", type=float, default=1e-4)
    chosen = options.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for run in RUNS:
            result = start(chosen, run, folder)
            first = first or result
            rows[run] = {
                "seconds": round_to(result.seconds, 4),
                "divided_parameters": result.divided,
                "curve": [
                    {name: round_to(value) for name, value in line.items()}
                    | {"norm": round_to(norm, 9), "score": round_to(sum(step) / len(step))}
                    for line, norm, step in zip(
                        result.lines, result.norms, result.scores, strict=True
                    )
                ],
            }
            if result is not first:
                rows[run]["beside_one"] = compared(result, first)
            note(f"{run}: {rows[run].get('beside_one', rows[run])}")
            settings = {name: value for name, value in vars(chosen).items() if name != "output"}
            publish("trl_fsdp", settings | {"limits": LIMITS, "runs": rows}, chosen.output)


if __name__ == "__main__":
    main()
