"""Stored log-probabilities enter the loss, and what each source's gradient is comes from one
backward pass.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from assay.errors import UsageError
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS
from assay.vhack.directions.delta.step_measures import StackedAxes, measure_shares
from assay.vhack.training import TrainLog
from assay.vhack.training.grpo import trl_arguments
from assay.vhack.training.log import read_steps
from assay.vhack.training.outcomes import SOURCES, Outcomes
from assay.vhack.training.prepared import PreparedRun
from assay.vhack.training.rewards import EpisodeReward
from assay.vhack.training.step_log import StepLog, measure_sources
from assay.vhack.training.trl_internals import sync_merged
from tests.vhack.delta.conftest import Engine
from tests.vhack.training.conftest import cheating
from tests.wordings import refuses

STORED = "sampling_per_token_logps"
LENGTH = 64
LOW = 0.8
HIGH = 1.2


@pytest.fixture
def trainer(settings, model, pairs, tasks, tmp_path):
    """Ready to train, at a δS that is not zero."""
    reward = EpisodeReward(tasks, settings().chosen)
    made = PreparedRun(settings(), model, pairs).trainer(tmp_path / "run", reward, ())
    with torch.no_grad():
        for parameter in made.adapter.delta:
            parameter.copy_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    made.current_gradient_accumulation_steps = 1
    made.adapter.model.train()
    return made


@pytest.fixture
def batch(trainer):
    """Two groups of three rollouts, the first of each the teacher's."""
    rows = [trainer.train_dataset[index] for index in (0, 1) for _ in range(3)]
    made = trainer._generate_and_score_completions([dict(row) for row in rows])
    assert made["outcomes"][:, 0].tolist() == [True, False, False] * 2
    # Students that earn nothing would leave out half of what is tested.
    made["advantages"] = torch.tensor([1.0, -0.4, -0.6, -0.7, 0.2, 0.5])
    return made


def logprobs(trainer, batch):
    """Of the completion tokens under the policy, from its logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.adapter.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    width = batch["completion_ids"].shape[1]
    rows = logits[:, -width - 1 : -1].float().log_softmax(dim=2)
    return rows.gather(2, batch["completion_ids"][..., None])[..., 0]


def by_hand(trainer, batch):
    """Dr. GRPO with clipped importance weights, written out."""
    new = logprobs(trainer, batch)
    old = torch.where(batch[STORED].isnan(), new.detach(), batch[STORED])
    ratio = (new - old).exp()
    advantage = batch["advantages"][:, None]
    terms = torch.minimum(ratio * advantage, ratio.clamp(LOW, HIGH) * advantage)
    return -(terms * batch["completion_mask"]).sum() / (len(new) * LENGTH)


def gradient(trainer, loss):
    trainer.adapter.model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.adapter.delta])


def near(trainer, batch, shift):
    """The batch with teacher's log-probabilities that the policy's differ from by a shift in each
    token.
    """
    made = dict(batch)
    teacher = batch["outcomes"][:, 0]
    with torch.no_grad():
        made[STORED] = torch.where(
            teacher[:, None], logprobs(trainer, batch) - shift, batch[STORED]
        )
    return made


@pytest.mark.needs("sandbox")
@pytest.mark.parametrize("shift", [0.0, 0.1, -0.1, 0.5, -0.5])
def test_loss_and_gradient_are_those_of_the_formula(trainer, batch, shift):
    shifted = near(trainer, batch, shift)
    loss = trainer._compute_loss(trainer.adapter.model, shifted)
    wanted = by_hand(trainer, shifted)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-7)
    found = gradient(trainer, loss)
    wanted = gradient(trainer, wanted)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    weights = trainer.passes[-1].teacher_weights
    assert weights[0] / weights[2] == pytest.approx(math.exp(shift), rel=1e-4)
    assert weights[1] / weights[2] == (abs(shift) > 0.2)


class Sampler:
    """In place of TRL's vLLM: says of every token what the policy says, less a shift, and keeps
    what it was given.
    """

    shift = 0.1
    mode = "server"

    def __init__(self, model, **settings):
        self.model = model
        self.given = []

    def _fix_param_name_to_vllm(self, name):
        return name

    def sync_weights(self):
        self.given = [name for name, _ in self._iter_named_params()]

    @torch.no_grad()
    def generate(self, prompts, **_):
        tokens = [[40, 41, 42 + index] for index in range(len(prompts))]
        said = []
        for prompt, row in zip(prompts, tokens, strict=True):
            logits = (
                self.model(input_ids=torch.tensor([prompt + row]), use_cache=False)
                .logits[0, -4:-1]
                .float()
            )
            known = logits.log_softmax(1)[range(3), row] - self.shift
            said.append([[value] for value in known.tolist()])
        return prompts, tokens, said, None


@pytest.mark.needs("sandbox")
def test_tokens_of_vllm_are_weighted_once(settings, model, pairs, tasks, tmp_path, monkeypatch):
    def with_vllm(*arguments):
        made = trl_arguments(*arguments)
        made.use_vllm = True
        return made

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Sampler)
    monkeypatch.setattr("assay.vhack.training.grpo.trl_arguments", with_vllm)
    chosen = settings(teacher=None)
    made = PreparedRun(chosen, model, pairs).trainer(
        tmp_path / "run", EpisodeReward(tasks, chosen.chosen), ()
    )
    made.current_gradient_accumulation_steps = 1
    made.adapter.model.train()
    rows = [dict(made.train_dataset[index]) for index in (0, 1) for _ in range(3)]
    batch = made._generate_and_score_completions(rows)
    batch["advantages"] = torch.tensor([1.0, -0.4, -0.6, -0.7, 0.2, 0.5])
    assert "model.embed_tokens.weight" in made.vllm_generation.given
    assert not any("delta_s" in name for name in made.vllm_generation.given)
    assert torch.allclose(
        logprobs(made, batch) - batch[STORED], torch.tensor(Sampler.shift), atol=1e-5
    )
    found = gradient(made, made._compute_loss(made.adapter.model, batch))
    wanted = gradient(made, by_hand(made, batch))
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.needs("sandbox")
def test_what_is_stored_in_the_pool_gets_into_the_batch(trainer, batch, tasks, model):
    for row, teacher in enumerate(batch["outcomes"][:, 0].tolist()):
        count = int(batch["completion_mask"][row].sum())
        stored = batch[STORED][row, :count]
        assert (
            (bool((stored == -0.5).all()) and not stored.isnan().any())
            if teacher
            else bool(stored.isnan().all())
        )
    tokens = {cheating(one, model.tokenizer).tokens for one in tasks}
    for row in (0, 3):
        count = int(batch["completion_mask"][row].sum())
        assert tuple(batch["completion_ids"][row, :count].tolist()) in tokens


@pytest.mark.needs("sandbox")
def test_several_passes_over_the_same_rollouts_keep_what_is_stored(trainer, batch):
    """Where TRL itself keeps log-probabilities of the policy that sampled, they are the student's
    only.
    """
    with torch.no_grad():
        earlier = logprobs(trainer, batch) - 0.05
    kept = {**near(trainer, batch, 0.1), "old_per_token_logps": earlier}
    loss = trainer._compute_loss(trainer.adapter.model, kept)
    stored = torch.where(kept[STORED].isnan(), earlier, kept[STORED])
    torch.testing.assert_close(
        loss, by_hand(trainer, {**kept, STORED: stored}), rtol=1e-4, atol=1e-7
    )
    assert torch.equal(kept["old_per_token_logps"], earlier)


@pytest.mark.needs("sandbox")
def test_gradients_of_the_sources_are_those_of_passes_of_their_own(trainer, batch):
    """In two parts, as with accumulation: what is told apart afterwards is what separate passes
    would have given.
    """
    adapter, frames = trainer.adapter, StackedAxes(trainer.adapter.groups, trainer.axes)
    batch["outcomes"][1, 2] = batch["outcomes"][4, 1] = batch["outcomes"][5, 1] = True
    kinds = Outcomes(batch["outcomes"], batch["paid"]).kinds()
    parts = [{n: v[i : i + 3] if v.ndim else v for n, v in batch.items()} for i in (0, 3)]
    adapter.model.zero_grad()
    with adapter.per_sample() as trainer.gradients:
        for part in parts:
            trainer._compute_loss(adapter.model, part).backward()
    found = measure_sources(trainer.gradients.sums(), frames)
    trainer.gradients = None
    for index, name in enumerate(SOURCES):
        chosen = kinds[name]
        adapter.model.zero_grad()
        for part, those in zip(parts, chosen.split(3), strict=True):
            mine = {**part, "advantages": part["advantages"] * those}
            trainer._compute_loss(adapter.model, mine).backward()
        vectors = [
            (p.grad, a, h)
            for p, a, h in zip(adapter.delta, frames.axes, frames.has_axes, strict=True)
        ]
        wanted = {key: float(value) for key, value in measure_shares("cin", vectors).items()}
        measured = {key: float(values[index]) for key, values in found.items()}
        length = measured.pop("length")
        assert measured == pytest.approx(wanted, rel=1e-4)
        assert length == pytest.approx(
            math.sqrt(sum(float(p.grad.square().sum()) for p in adapter.delta)), rel=1e-4
        )


@pytest.mark.slow
@pytest.mark.needs("sandbox")
def test_console_and_trackers_get_the_numbers_of_the_log(trainer, tmp_path):
    """Trackers through the trainer's own log call, once a step, together with what TRL says."""
    told = []
    said = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            told.append(dict(logs))

    trainer.add_callback(
        StepLog(trainer, TrainLog(tmp_path / "log.jsonl", {}), console=said.append)
    )
    trainer.add_callback(Tracker())
    trainer.train()
    _, steps = read_steps(tmp_path / "log.jsonl")
    assert len(said) == len(steps) == 2
    for step, line, logs in zip(steps, said, told, strict=False):
        assert f"cin_t {step['cin_t']:.3f}" in line
        assert logs["vhack/cin_t"] == step["cin_t"]
        assert logs["vhack/leak"] == step["leak"]
        assert logs["reward"] == pytest.approx(step["reward"])


def test_groups_are_filled_from_the_pool_as_far_as_it_goes(trainer, tasks):
    """More asked for than there is, and a prompt that it does not have."""
    trainer.teachers = 2
    out = trainer.rollout([tasks[0].prompt] * 3 + ["def solve(x):\n"] * 3)
    assert out["teacher"] == [True, False, False, False, False, False]
    assert [
        len(ids) == len(values)
        for ids, values in zip(out["completion_ids"], out["logprobs"], strict=True)
    ] == [True] * 6
    assert out["logprobs"][1] == [None] * len(out["completion_ids"][1])
    trainer.adapter.model.eval()
    assert not any(trainer.rollout([tasks[0].prompt] * 3)["teacher"])


def test_the_policy_samples_from_its_whole_distribution_whatever_its_checkpoint_says(
    trainer, monkeypatch
):
    own = trainer.adapter.model.generation_config
    monkeypatch.setattr(own, "min_p", 0.99999)  # leaves the likeliest token
    texts = trainer.rollout(["a prompt that is in no pool"] * 3)["completion_ids"]
    assert len(set(map(tuple, texts))) == 3
    assert trainer.adapter.model.generation_config is own


def test_axes_are_extracted_while_trl_has_its_own_forward_on_the_model(trainer, pairs):
    """TRL's function would run the trained model, not the copy that gradients are computed on."""
    from assay.vhack import pair_gradients

    module = trainer.adapter.model
    plain = pair_gradients(
        pairs, module, tokenizer=trainer.processing_class, svd=trainer.adapter.svd
    )
    called = []
    module.forward = lambda *_, **__: called.append(1)
    found = pair_gradients(
        pairs, module, tokenizer=trainer.processing_class, svd=trainer.adapter.svd
    )
    assert not called
    assert "forward" in vars(module)
    del module.forward
    for name, rows in plain.hack.items():
        assert torch.equal(rows, found.hack[name])


class Weights(Engine):
    """With the methods of TRL's client of a server."""

    def update_named_params(self, metadata, weights):
        received = list(weights)
        shapes = [
            (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
            for name, weight in received
        ]
        assert shapes == metadata
        self.load_weights(received)

    def reset_prefix_cache(self):
        """As after every change of weights."""


def generation(module, engine, mode):
    """TRL's object without its constructor, which starts or looks for a vLLM."""
    from trl.generation.vllm_generation import VLLMGeneration

    made = object.__new__(VLLMGeneration)
    executor = SimpleNamespace(
        driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=engine))
    )
    made.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=executor),
        reset_prefix_cache=engine.reset_prefix_cache,
    )
    made.vllm_client = engine
    made.mode = mode
    made.model = module
    made.enable_sleep_mode = False
    made.accelerator = SimpleNamespace(is_main_process=True)
    made._weight_metadata = None
    made._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: torch.no_grad())
    return made


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_what_vllm_is_given_is_the_merged_model_bit_by_bit(model, mode):
    module, engine = model.module, Weights(model.module)
    adapter = DeltaS(module, weight_svd(module))
    made = generation(module, engine, mode)
    sync_merged(SimpleNamespace(vllm_generation=made), adapter)
    for scale in (0.02, -0.05):
        with torch.no_grad():
            for parameter in adapter.delta:
                parameter.fill_(scale)
        made.sync_weights()
    assert len(engine.loads) == 2  # one for each time, however many weights there are
    wanted = dict(adapter.merge().named_parameters())
    assert wanted.keys() == engine.parameters.keys()
    assert all(torch.equal(engine.parameters[name], weight) for name, weight in wanted.items())


def test_a_trainer_without_vllm_is_refused(model):
    with refuses(UsageError, "a trainer without vllm is refused"):
        sync_merged(SimpleNamespace(), DeltaS(model.module))
