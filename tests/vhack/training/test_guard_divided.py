"""A guard of a trainer of TRL whose model FSDP2 divides over two processes does what it does in
one.
"""

import os
import socket
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer

from assay.models import load_model
from assay.vhack import Sample
from assay.vhack.detectors import fit_judge
from assay.vhack.pairs import generate_pairs
from assay.vhack.training import Guard
from tests.vhack.two_processes import together

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'pin_memory' argument")]
ROLLOUTS = 4
SEED = 7


@contextmanager
def divided_on_cpus():
    """Let accelerate divide models over processes that have no GPU, which it does not by itself."""
    plain = AcceleratorState.__init__

    def initialize(self, *arguments, fsdp_plugin=None, **options):
        plain(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain


def completions_of(step, rows):
    """Tokens that depend on the step and the row alone."""
    generators = [torch.Generator().manual_seed(100 * step + row) for row in rows]
    return [
        torch.randint(97, 122, (9 + row,), generator=generator).tolist()
        for row, generator in zip(rows, generators, strict=True)
    ]


def written(prompts, trainer):
    first = trainer.accelerator.process_index * len(prompts)
    rows = range(first, first + len(prompts))
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions_of(trainer.state.global_step, rows),
        "logprobs": None,
    }


def pay(completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def train(checkpoint, folder, count):
    """Train two steps; what the guard saw, and the weights afterwards."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    judge = fit_judge(generate_pairs(6), model, detector="cin-lda")
    texts = model.tokenizer.batch_decode(completions_of(0, range(ROLLOUTS)))
    first = sorted(judge.scores([Sample("abc", text) for text in texts]))
    # Some of the first step are flagged and some are not.
    threshold = replace(judge.threshold, value=(first[1] + first[2]) / 2)
    judge = replace(judge, threshold=threshold)
    scores = []
    config = GRPOConfig(
        folder, max_steps=2, num_generations=ROLLOUTS, use_cpu=True, bf16=False, seed=SEED,
        per_device_train_batch_size=ROLLOUTS // count, max_completion_length=16, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3,
        optim="adamw_torch", gradient_checkpointing=False, shuffle_dataset=False,
        **({"fsdp": True, "fsdp_config": {"version": 2}, "ddp_backend": "gloo"} if count > 1 else {}),
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model.module,
        reward_funcs=[pay],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["abc", "de"]}),
        processing_class=model.tokenizer,
        rollout_func=written,
    )
    guard = Guard(judge, penalty=2.0).attach(trainer)
    plain = type(judge).scores

    def noted(self, samples):
        scores.append(plain(self, samples))
        return scores[-1]

    type(judge).scores = noted
    try:
        trainer.train()
    finally:
        type(judge).scores = plain
    parameters = dict(model.module.named_parameters())
    return {
        "scores": scores,
        "flagged": [line["flagged"] for line in guard.log],
        "divided": sum(isinstance(value, DTensor) for value in parameters.values()),
        "weights": {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in parameters.items()
        },
    }


def work(rank, device, checkpoint, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with divided_on_cpus():
        return train(checkpoint, folder, 2)


def test_scores_flags_and_weights_are_those_of_one_process(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # of a rollout_func
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = train(str(checkpoint), str(tmp_path / "one"), 1)
    ranks = together(work, tmp_path, "gloo", str(checkpoint), str(tmp_path / "two"), port)
    assert one["divided"] == 0
    assert all(rank["divided"] == len(one["weights"]) for rank in ranks)
    for step, scores in enumerate(one["scores"]):
        both = [score for rank in ranks for score in rank["scores"][step]]
        assert both == pytest.approx(scores, rel=1e-3, abs=1e-5)
    start = dict(
        load_model(str(checkpoint), dtype="float32", device="cpu").module.named_parameters()
    )
    for rank in ranks:
        assert rank["flagged"] == one["flagged"]
        for name, weight in one["weights"].items():
            way = weight - start[name].detach()
            assert (rank["weights"][name] - weight).norm() <= 0.02 * way.norm() + 1e-6, name
    assert 0 < one["flagged"][0] < 1
