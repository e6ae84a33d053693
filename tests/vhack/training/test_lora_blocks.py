"""LoRA in two blocks: which rollouts train which, and what is left when one is deleted."""

import copy

import numpy as np
import peft
import pytest
import torch

from assay.errors import UsageError
from assay.models import load_model
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.detectors.threshold import Threshold
from assay.vhack.training import Guard
from assay.vhack.training.lora_blocks import CLEAN, DOUBTFUL, FLAGGED, LoraBlocks
from tests.vhack.training.test_guard import OddLengthDetector, make_trainer

__all__ = ["make_trainer"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")
IDS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def judging(score, value=0.5, usual=-1.0):
    """A judge by a function of texts, who doubts scores between `usual` and `value`."""
    detector = OddLengthDetector("odd")
    return RolloutJudge(detector, score, Threshold(value, 0, 0, 1, 1, usual))


def adapted(checkpoint, rank=4):
    torch.manual_seed(0)
    module = load_model(str(checkpoint), dtype="float32", device="cpu").module
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    return peft.get_peft_model(module, config).eval()


def gradients(module, ids):
    module.zero_grad()
    logits_BTV = module(input_ids=ids).logits
    logits_BTV.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def halves(name, tensor):
    """The kept and the other block of a matrix."""
    return tensor.chunk(2, dim=0 if "lora_A" in name else 1)


def filled(module):
    """Let the blocks write something, as they do after some steps."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def test_each_rollout_trains_the_blocks_of_its_kind(checkpoint):
    module = adapted(checkpoint)
    blocks = LoraBlocks(module)
    plain = filled(adapted(checkpoint))
    alone = [gradients(plain, IDS[row : row + 1]) for row in range(3)]
    before = plain(input_ids=IDS).logits
    filled(module)
    blocks.kinds = torch.tensor([CLEAN, FLAGGED, DOUBTFUL])
    torch.testing.assert_close(module(input_ids=IDS).logits, before)
    for name, gradient in gradients(module, IDS).items():
        kept, added = halves(name, gradient)
        rows = [halves(name, row[name]) for row in alone]
        torch.testing.assert_close(kept, rows[0][0] + rows[2][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(added, rows[1][1] + rows[2][1], rtol=1e-4, atol=1e-5)


def test_what_is_left_is_the_kept_block_alone(checkpoint):
    module = adapted(checkpoint)
    plain = module.get_base_model()
    with module.disable_adapter():
        without = module(input_ids=IDS).logits
    blocks = LoraBlocks(module)
    filled(module)
    blocks.scale = 0.0
    kept = module(input_ids=IDS).logits
    assert not torch.equal(kept, without)
    blocks.detach()
    blocks.delete()
    torch.testing.assert_close(module(input_ids=IDS).logits, kept)
    # What was trained so may be trained again.
    LoraBlocks(module).detach()
    # Half of the rank computes the same, with half of the alpha.
    small = adapted(checkpoint, rank=2)
    state = {
        name: halves(name, tensor)[0]
        for name, tensor in module.state_dict().items()
        if "lora" in name
    }
    small.load_state_dict(state, strict=False)
    torch.testing.assert_close(small(input_ids=IDS).logits, kept)
    assert plain is module.get_base_model()


def test_it_begins_exactly_where_the_model_is(checkpoint):
    module = adapted(checkpoint)
    with module.disable_adapter():
        wanted = module(input_ids=IDS).logits
    LoraBlocks(module)
    assert torch.equal(module(input_ids=IDS).logits, wanted)


def test_passes_without_gradients_may_be_of_other_rollouts(checkpoint):
    module = adapted(checkpoint)
    blocks = LoraBlocks(module)
    filled(module)
    blocks.kinds = torch.tensor([CLEAN, FLAGGED, DOUBTFUL])
    wanted = module(input_ids=IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=IDS[:2]).logits, wanted[:2])


def vary(completions, **_):
    """Pay by the letters, so that rollouts differ."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def unmarked(completions, **_):
    return [0.0] * len(completions)


OPTIONS = {"functions": (vary, unmarked)}


def lora_of(trainer):
    return {
        name: tensor.clone()
        for name, tensor in trainer.model.state_dict().items()
        if "lora" in name
    }


@pytest.mark.slow
def test_without_a_flag_the_kept_block_is_trained_as_it_is_alone(make_trainer):
    """In the end it is a LoRA of half the rank, trained without the guard."""
    judge = judging(lambda evidence: torch.zeros(len(evidence)).numpy() - 2)
    torch.manual_seed(0)
    absorbed = make_trainer(
        folder="absorb", steps=4, peft_config=peft.LoraConfig(**LORA), **OPTIONS
    )
    half = LORA | {"r": 2, "lora_alpha": 4}
    plain = make_trainer(folder="plain", steps=4, peft_config=peft.LoraConfig(**half), **OPTIONS)
    begin = {name: halves(name, tensor)[0] for name, tensor in lora_of(absorbed).items()}
    plain.model.load_state_dict(begin, strict=False)
    guard = Guard(judge, "absorb").attach(absorbed)
    for trainer in (absorbed, plain):
        trainer.args.learning_rate = 0.01
        trainer.args.max_grad_norm = 0.0
        torch.manual_seed(0)
        trainer.train()
    assert guard.flags == guard.doubtful == [False] * 4
    for name, wanted in lora_of(plain).items():
        kept, added = halves(name, lora_of(absorbed)[name])
        assert torch.count_nonzero(added) == 0
        assert "lora_A" in name or torch.count_nonzero(kept)
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_flagged_rollouts_train_the_block_that_is_deleted(make_trainer):
    judge = judging(lambda evidence: torch.ones(len(evidence)).numpy())
    seen = []
    trainer = make_trainer(folder="run", steps=2, peft_config=peft.LoraConfig(**LORA), **OPTIONS)
    guard = Guard(judge, "absorb").attach(trainer)
    begin = lora_of(trainer)
    compute = trainer.compute_loss

    def keep(*arguments, **options):
        seen.append(copy.deepcopy(lora_of(trainer)))
        return compute(*arguments, **options)

    trainer.compute_loss = keep
    trainer.train()
    for name, tensor in lora_of(trainer).items():
        kept, added = halves(name, tensor)
        assert torch.equal(kept, halves(name, begin[name])[0])
        assert torch.count_nonzero(added) == 0
    assert any(
        torch.count_nonzero(halves(name, tensor)[1])
        for name, tensor in seen[-1].items()
        if "lora_B" in name
    )
    assert guard.blocks is not None
    assert len(trainer.model(input_ids=IDS).logits) == 3  # any batch, after training


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_turn(make_trainer):
    """The checkpoint is of one batch, after which the kept block writes alone."""
    judge = judging(lambda evidence: np.arange(len(evidence)) % 3 - 1.0)
    options = {"peft_config": peft.LoraConfig(**LORA), "functions": (vary, unmarked)}
    trained = []
    for folder, steps, checkpoint in (("whole", 3, None), ("cut", 1, None), ("cut", 3, 1)):
        torch.manual_seed(0)
        trainer = make_trainer(folder=folder, steps=steps, **options)
        Guard(judge, "absorb").attach(trainer)
        path = f"{trainer.args.output_dir}/checkpoint-{checkpoint}" if checkpoint else None
        trainer.train(resume_from_checkpoint=path)
        trained.append(lora_of(trainer))
    for name, wanted in trained[0].items():
        assert torch.equal(trained[2][name], wanted)


def test_an_evaluation_leaves_the_factor_of_a_batch(make_trainer):
    judge = judging(lambda evidence: torch.ones(len(evidence)).numpy())
    trainer = make_trainer(peft_config=peft.LoraConfig(**LORA), **OPTIONS)
    trainer.compute_loss = lambda model, inputs: guard.blocks.scale
    guard = Guard(judge, "absorb").attach(trainer)
    batches = []
    for is_training in (True, False, True):
        trainer.model.train(is_training)
        batches.append(trainer._generate_and_score_completions([{"prompt": "abc"}] * 4))
    factors = [trainer.compute_loss(trainer.model, batch) for batch in batches]
    assert factors == [1.0, 0.0, 0.0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "others",
    [
        None,
        {"r": 3},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_what_flagged_rollouts_would_train_beside_the_blocks_is_refused(make_trainer, others):
    judge = judging(lambda evidence: torch.ones(len(evidence)).numpy())
    options = {"peft_config": peft.LoraConfig(**LORA | others)} if others else {}
    with pytest.raises(UsageError):
        Guard(judge, "absorb").attach(make_trainer(**options))


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_what_no_function_pays_is_in_no_baseline_and_has_no_advantage(make_trainer, scale):
    """Of a flagged, a paid, another paid and an unpaid rollout."""
    judge = judging(lambda evidence: np.array([1.0, -2.0, -2.0, -2.0]))
    paid = [4.0, 1.0, 3.0, None]
    functions = (lambda completions, **_: paid, lambda completions, **_: [None] * 4)
    trainer = make_trainer(peft_config=peft.LoraConfig(**LORA), functions=functions)
    guard = Guard(judge, "absorb").attach(trainer)
    trainer.scale_rewards = scale
    trainer.model.train()
    rows = [{"prompt": "abc"}] * 4
    spread = 1.0 if scale == "none" else np.std([4, 1, 3], ddof=1) + 1e-4
    found = trainer._generate_and_score_completions(rows)["advantages"]
    np.testing.assert_allclose(found * spread, [2.0, -1.0, 1.0, 0.0], atol=1e-5)
    paid = [None] * 4
    assert not trainer._generate_and_score_completions(rows)["advantages"].any()
    guard.detach()
    trainer.multi_objective_aggregation = "normalize_then_sum"
    with pytest.raises(UsageError):
        guard.attach(trainer)
