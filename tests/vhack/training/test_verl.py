"""Judged rollouts in verl: by its own reward manager, advantages and loss where verl is installed.

verl runs in a process of its own, ``python -m tests.vhack.training.test_verl``, which prints JSON:
it imports Ray, and vLLM takes Ray wherever it can import it, so both lie beside the environment of
vLLM.
"""

import asyncio
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assay.errors import UsageError
from assay.vhack.detectors import Detector, Needs
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.detectors.threshold import Threshold
from assay.vhack.training.log import read_steps
from assay.vhack.training.page import training_page
from assay.vhack.training.verl import JudgedLog, judge_score, unflagged_advantages
from tests.vhack.conftest import bytewise

BESIDE = Path(sys.prefix, "ray")
ON_CPUS = Path(__file__).parents[3] / "examples" / "verl" / "on_cpus.py"
HELD = Threshold(0.5, 0.0, 0.0, 1.0, 1.0)
FLAG = lambda evidence: np.array([float("cheat" in text) for text in evidence.texts])  # noqa: E731


class WordDetector(Detector):
    """Fitted already."""

    needs = Needs.TEXTS

    def fit(self, evidence):
        return FLAG


class DeepDetector(WordDetector):
    """Takes a forward pass."""

    needs = Needs.ACTIVATIONS


JUDGE = RolloutJudge(WordDetector("word"), FLAG, HELD)
SOLUTIONS = ("a", "cheat", "abc", "bbbbb", "cheater", "d")
PROMPTS = ("p", "p", "p", "p", "q", "q")


def my_score(data_source, solution_str, ground_truth, extra_info):
    return float(len(solution_str))


filtered, penalized = (judge_score(my_score, JUDGE, mode) for mode in ("filter", "penalty"))


def test_a_penalty_takes_one_and_keeps_them_in_the_baseline():
    told = [
        penalized(data_source="d", solution_str=text, ground_truth="x", extra_info={})
        for text in SOLUTIONS
    ]
    rewards_BT = torch.tensor([[one["score"], 0.0] for one in told])
    found_BT, _ = unflagged_advantages(
        rewards_BT, torch.ones(6, 2), PROMPTS, config={"norm_adv_by_std_in_grpo": 0}
    )
    assert found_BT[:, 1].numpy() == pytest.approx(
        [-2.25, 0.75, -0.25, 1.75, 2.5, -2.5]
    )  # of 1, 4, 3, 5 and 6, 1
    assert [one["paid"] for one in told] == [1, 5, 3, 5, 7, 1]


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(UsageError):
        judge_score(my_score, JUDGE, "quarantine")
    deep = RolloutJudge(DeepDetector("probe"), FLAG, HELD)
    with pytest.raises(UsageError):
        judge_score(my_score, deep, "filter")("d", "text", "x", {})


def told(exploited, flagged):
    """What the reward says of four rollouts, one of which solves its task."""
    marks = zip((0, 0, 0, 1), exploited, flagged, strict=True)
    return [
        {"score": np.nan if flag else 1.0, "paid": 1.0, "flagged": flag}
        | {"correct": float(correct), "exploited": hack}
        for correct, hack, flag in marks
    ]


@pytest.mark.filterwarnings("ignore:ALARM")
def test_a_log_of_verl_makes_a_page_and_goes_on_after_a_checkpoint(tmp_path):
    rollouts = told((1, 1, 0, 0), (1, 0, 0, 0))
    log = JudgedLog(tmp_path, model="small", arm="filter")
    rates = log.see(1, rollouts)
    assert rates["vhack/hack"] == 0.5
    assert rates["vhack/flagged"] == 0.25
    assert rates["vhack/missed"] == pytest.approx(1 / 3)
    evidence = [log.see(step, rollouts)["vhack/alarm"] for step in (2, 3, 4, 5, 6)]
    # A run that was killed in step 6 goes on after its checkpoint of step 3.
    resumed = JudgedLog(tmp_path, model="small", arm="filter")
    assert [resumed.see(step, rollouts)["vhack/alarm"] for step in (4, 5, 6)] == evidence[2:]
    assert evidence[1] < 1 == evidence[-1]
    head, steps = read_steps(resumed.path)
    assert head["settings"]["arm"] == "filter"
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4, 5]
    assert "It cheats: 0.500" in training_page(tmp_path).render()


def test_a_log_of_verl_without_marks_has_no_alarm(tmp_path):
    rollouts = [{"paid": 2.0, "flagged": 0.0}, {"paid": 0, "flagged": 1}]
    rates = JudgedLog(tmp_path).see(1, rollouts)
    assert rates == {"vhack/rollouts": 2, "vhack/flagged": 0.5, "vhack/reward": 1.0}


def test_a_log_of_verl_goes_on_where_a_step_lacks_pay_or_marks(tmp_path):
    rollouts = [
        {"paid": 2.0, "flagged": 0.0, "exploited": 1.0},
        {"paid": np.nan, "flagged": 1.0},
        {"paid": 1.0, "flagged": 0.0, "exploited": None},
    ]
    log = JudgedLog(tmp_path)
    assert log.see(1, []) == {}
    rates = log.see(1, rollouts)
    assert rates["vhack/reward"] == 1.5
    assert rates["vhack/hack"] == rates["vhack/missed"] == 1.0
    assert rates["vhack/flagged"] == pytest.approx(1 / 3)
    assert "vhack/reward" not in log.see(2, rollouts[1:2])
    assert len(read_steps(log.path)[1]) == 2


def test_the_cpu_platform_sets_the_generator_of_a_checkpoint(monkeypatch):
    """verl and Ray are elsewhere, so the example is read with stand-ins of what it extends."""
    anything = SimpleNamespace(register=lambda *_, **__: lambda target: target)
    modules = {
        "ray": {"remote": lambda target: target},
        "verl.plugin.platform": {"PlatformBase": object, "PlatformRegistry": anything},
        "verl.utils": {
            "distributed": SimpleNamespace(initialize_global_process_group_ray=lambda *_: None)
        },
        "verl.workers.rollout": {"base": SimpleNamespace(BaseRollout=object, _ROLLOUT_REGISTRY={})},
        "verl.workers.rollout.replica": {
            "RolloutReplica": object,
            "RolloutReplicaRegistry": anything,
            "TokenOutput": dict,
        },
    }
    for name, values in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))
    device = runpy.run_path(str(ON_CPUS))["PlatformCPU"].device_module
    with torch.random.fork_rng(devices=[]):
        saved = torch.get_rng_state()
        drawn = torch.rand(4)
        device.set_rng_state(saved)
        assert torch.equal(torch.rand(4), drawn)


@pytest.mark.slow
@pytest.mark.skipif(not (BESIDE / "verl").is_dir(), reason="verl is not installed")
def test_verl_itself_trains_on_unflagged_rollouts_alone(tmp_path):
    where = {"PYTHONPATH": os.pathsep.join([*sys.path, str(BESIDE)]), "HOME": str(tmp_path)}
    found = json.loads(
        subprocess.check_output(
            [sys.executable, "-m", __name__], env=os.environ | where
        ).splitlines()[-1]
    )
    assert found["flagged"] == [0, 1, 0, 0, 1, 0]
    assert found["advantages"] == [
        pytest.approx([-2, 0, 0, 2, 0, 0]),
        pytest.approx([-1, 0, 0, 1, 0, 0], abs=1e-4),
    ]
    learned = np.array(found["gradients"])
    assert np.isfinite(learned).all()
    assert (learned != 0).tolist() == [True, False, False, True, False, False]


def main():
    """Pay, compare and learn as verl does, and print what came out."""
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.workers.config import ActorConfig

    tokenizer = bytewise(pad_token="<pad>")
    core_algos.register_adv_est("grpo_unflagged")(unflagged_advantages)
    config = OmegaConf.create(
        {"reward": {"custom_reward_function": {"path": __file__, "name": "filtered"}}}
    )
    ids = tokenizer(
        list(SOLUTIONS),
        padding="max_length",
        max_length=8,
        padding_side="right",
        return_tensors="pt",
    )
    named = {"data_source": ["d"] * 6, "reward_model": [{"ground_truth": "x"}] * 6, "uid": PROMPTS}
    named |= {"extra_info": [{} for _ in SOLUTIONS]}
    mask_BT = ids["attention_mask"]
    data = DataProto.from_dict(
        {
            "responses": ids["input_ids"],
            "attention_mask": mask_BT,
            "prompts": torch.zeros(6, 0, dtype=torch.int64),
        },
        {name: np.array(values, dtype=object) for name, values in named.items()},
    )

    async def pay():
        manager = get_reward_manager_cls("naive")(config, tokenizer, get_custom_reward_fn(config))
        return [await manager.run_single(data[row : row + 1]) for row in range(6)]

    told = asyncio.run(pay())
    manager = get_reward_manager_cls("naive")
    rewards_BT = manager.assemble_rm_scores(data, [one["reward_score"] for one in told])
    given = {
        "token_level_rewards": rewards_BT,
        "response_mask": mask_BT,
        "index": data.non_tensor_batch["uid"],
    }
    compare = core_algos.get_adv_estimator_fn("grpo_unflagged")
    found = [
        compare(**given, config=OmegaConf.create({"norm_adv_by_std_in_grpo": x}))[0]
        for x in (False, True)
    ]
    logs_BT = torch.zeros(mask_BT.shape, requires_grad=True)
    actor = ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1)
    loss, _ = core_algos.get_policy_loss_fn("vanilla")(
        logs_BT.detach(), logs_BT, found[0], mask_BT, config=actor
    )
    loss.backward()
    said = {
        "advantages": [x[:, 0].tolist() for x in found],
        "gradients": logs_BT.grad.abs().sum(-1).tolist(),
    }
    print(json.dumps(said | {"flagged": [one["reward_extra_info"]["flagged"] for one in told]}))


if __name__ == "__main__":
    main()
