"""What gates and logs add to a training step, what the adapter adds to generation, and LoRA of the same model beside.

Three comparisons, each in rounds in which all take turns, so that whatever else the machine does meets all of them;
medians are compared.

- *trainer*: a whole step of TRL's trainer, generation included. ``with`` is what `assay vhack train` does: one-sided
  gate on the gradient, gradients of single rollouts, measures, log. ``without`` is the same trainer and adapter with
  plain AdamW and no log. ``lora`` is TRL's trainer with a PEFT LoRA on the same projections. Rewards are made up: the
  sandbox takes the same time for all.
- *step*: forward, backward, optimiser and merge alone.
- *generation*: the plain model, merged, hook mode, LoRA.
"""

import copy
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from _common import note, parser, publish
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from assay.models import load_model
from assay.vhack import Basis, weight_svd
from assay.vhack.delta import ARMS, DeltaS, Gate, Kinds, ProjectedOptimizer
from assay.vhack.environment import episodes
from assay.vhack.training import TrainLog, TrainSettings
from assay.vhack.training._callback import StepLog, by_source, source_shares
from assay.vhack.training._grpo import GRPO, trl_arguments
from assay.vhack.training._rewards import FLAGS, EpisodeReward, Outcomes

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16
LR = 1e-4


def axes_of(svd, k=5):
    generator = torch.Generator().manual_seed(0)
    axes = {
        name: torch.linalg.qr(torch.randn(factors.rank, k, generator=generator))[0].T.contiguous()
        for name, factors in svd.items()
    }
    return Basis(axes, {n: torch.ones(k) for n in axes}, {n: torch.tensor([[1, 0]] * k) for n in axes})


def kinds_of(ids):
    """Kinds of rollouts: the first quarter is the teacher's, the second half correct, and the rest failed."""
    flags = torch.zeros(len(ids), len(FLAGS), dtype=torch.bool)
    flags[: len(ids) // 4, 0] = flags[len(ids) // 2 :, 1] = True
    return Kinds.of(list(Outcomes(flags).kinds().values()), ids.device)


def clock_of(device):
    """A function that gives the seconds of a piece of work, the device waited for."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def clock(work):
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    return clock


def in_turns(works, rounds, clock, warm=2):
    """Median seconds of each piece of work, by name."""
    seconds = {name: [] for name in works}
    for index in range(rounds + warm):
        for name, work in works.items():
            taken = clock(work)
            if index >= warm:
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def lora_of(module):
    return get_peft_model(module, LoraConfig(r=LORA_RANK, target_modules=PROJECTIONS, lora_dropout=0.0))


def steps(module, lora, svd, ids, basis, rounds, clock):
    adapter = DeltaS(module, svd)

    def backward(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    def wrapped(gate, level):
        inner = torch.optim.AdamW(adapter.delta, lr=LR)
        return ProjectedOptimizer(inner, adapter, basis, gate=Gate(gate), level=level)

    def with_plain(optimiser):
        optimiser.zero_grad()
        backward(module)
        optimiser.step()
        adapter.refresh()

    def with_measures(optimiser):
        optimiser.zero_grad()
        backward(module)
        optimiser.step()
        optimiser.measures.as_dict()

    kinds = kinds_of(ids)

    def with_sources(optimiser):
        optimiser.zero_grad()
        with adapter.per_sample() as rollouts:
            rollouts.kinds = kinds
            backward(module)
        found = by_source(source_shares(rollouts, optimiser.frames))
        optimiser.step()
        optimiser.measures.as_dict()
        return found

    def with_lora(optimiser):
        optimiser.zero_grad()
        backward(lora)
        optimiser.step()

    plain, seed, exact = (
        torch.optim.AdamW(adapter.delta, lr=LR),
        wrapped("one_sided", "gradient"),
        wrapped("two_sided", "update"),
    )
    peft = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=LR)
    found = in_turns(
        {
            "without": lambda: with_plain(plain),
            "gradient": lambda: with_measures(seed),
            "update": lambda: with_measures(exact),
            "gradient_and_sources": lambda: with_sources(seed),
            "lora": lambda: with_lora(peft),
        },
        rounds,
        clock,
    )
    adapter.detach()
    return found


def generations(module, lora, svd, ids, rounds, tokens, clock):
    hooked, merged = copy.deepcopy(module), copy.deepcopy(module)
    DeltaS(merged, svd)
    DeltaS(hooked, svd, mode="hook")
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    models = {"plain": module, "merged": merged, "hook": hooked, "lora": lora}
    works = {n: lambda model=model: model.generate(input_ids=ids, **settings) for n, model in models.items()}
    return in_turns(works, rounds, clock, warm=1)


class Stopwatch(TrainerCallback):
    """Seconds of every step of a trainer but the first of each call."""

    def __init__(self, wait):
        self.wait, self.seconds, self.began = wait, [], 0.0

    def on_step_begin(self, args, state, control, **_):  # noqa: D102
        self.wait()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):  # noqa: D102
        self.wait()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.began)


class MadeUp(EpisodeReward):
    """Pays the second half of each group; nothing is run."""

    def __init__(self, tasks, group):
        super().__init__(tasks, ARMS["none"])
        self.group = group

    def __call__(self, prompts, completions, episode, **others):  # noqa: D102
        half = [index % self.group >= self.group // 2 for index in range(len(prompts))]
        rows = [[False, False, paid, False] for paid in half]
        self.last = Outcomes(torch.tensor(rows))
        return [float(paid) for paid in half]


def trainers(model, lora, tokenizer, svd, basis, given, folder):
    """The three trainers with their stopwatches, each around a model of its own."""
    settings = TrainSettings(
        model=given.model, steps=1 + given.trainer_steps, prompts=2, group=given.batch, tasks=32, lr=LR,
        max_new_tokens=given.new_tokens, save_every=1000,
    )  # fmt: skip
    tasks = episodes(settings.tasks, difficulty=(1, 1))
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    made = {}

    def arguments(name):
        found = trl_arguments(settings, model, folder / name, ())
        found.save_strategy = "no"
        return found

    for name, gate in (("without", None), ("with", Gate())):
        module = copy.deepcopy(model.module)
        adapter = DeltaS(module, svd)
        inner = torch.optim.AdamW(adapter.delta, lr=LR)
        optimiser = inner if gate is None else ProjectedOptimizer(inner, adapter, basis, gate=gate, max_norm=1.0)
        made[name] = GRPO(
            adapter, optimiser, MadeUp(tasks, settings.group), arguments(name), prompts=64 * settings.prompts,
            processing_class=tokenizer,
        )  # fmt: skip
        if gate is not None:
            made[name].add_callback(StepLog(made[name], TrainLog(folder / "log.jsonl", {})))
    reward = MadeUp(tasks, settings.group)
    made["lora"] = GRPOTrainer(
        model=lora, reward_funcs=[reward], args=arguments("lora"), processing_class=tokenizer,
        train_dataset=reward.dataset(64 * settings.prompts, 0),
    )  # fmt: skip
    watches = {}
    for name, trainer in made.items():
        trainer.remove_callback(PrinterCallback)
        watches[name] = Stopwatch(wait)
        trainer.add_callback(watches[name])
    return made, watches


def trained(model, lora, tokenizer, svd, basis, given):
    with tempfile.TemporaryDirectory() as folder:
        made, watches = trainers(model, lora, tokenizer, svd, basis, given, Path(folder))
        for index in range(given.trainer_rounds + 1):
            for trainer in made.values():
                trainer.train()
            if not index:
                for watch in watches.values():
                    watch.seconds.clear()
        return {name: median(watch.seconds) for name, watch in watches.items()}


def over(seconds, reference):
    return {name: value / seconds[reference] for name, value in seconds.items() if name != reference}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="reference:qwen3")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--new-tokens", type=int, default=24)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--trainer-rounds", type=int, default=3)
    arguments.add_argument("--trainer-steps", type=int, default=2)
    given = arguments.parse_args()
    model = load_model(given.model, dtype=given.dtype, device=given.device)
    # Shapes have random weights and no tokenizer; any will do, for what is generated is not looked at.
    tokenizer = model.tokenizer or load_model("reference:qwen3", device="cpu").tokenizer
    module, clock = model.module, clock_of(given.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (given.batch, given.tokens), generator=generator).to(given.device)
    note("factors")
    svd = weight_svd(module)
    basis = axes_of(svd)
    lora = lora_of(copy.deepcopy(module))
    note("generation")
    with torch.no_grad():
        generated = generations(module, lora, svd, ids[:, :32], max(2, given.rounds // 2), given.new_tokens, clock)
    note("trainer")
    whole = trained(model, lora_of(copy.deepcopy(module)), tokenizer, svd, basis, given)
    note("steps")
    alone = steps(module, lora, svd, ids, basis, given.rounds, clock)
    publish(
        "vhack_training_step",
        {
            "settings": {**{k: v for k, v in vars(given).items() if k != "output"}, "lora_rank": LORA_RANK},
            "trainer_step_seconds": whole,
            "trainer_step_over_without": over(whole, "without"),
            "step_seconds": alone,
            "step_over_without": over(alone, "without"),
            "generation_seconds": generated,
            "generation_over_plain": over(generated, "plain"),
        },
        given.output,
    )


if __name__ == "__main__":
    main()
