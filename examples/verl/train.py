"""Train a tiny model with verl on CPUs, judged: flags, log, page, and resumption.

    python examples/verl/train.py --steps 20 --out run [--mode penalty]

Needs verl 0.9.1 and what the page on training names. OUT gets verl's checkpoints, `log.jsonl` with
a line a step, and `page.html`. The same command goes on after the last checkpoint, however the run
ended.
"""

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REWARDS = {"filter": "filtered", "penalty": "penalized"}

# verl's workers inherit these.
os.environ |= {
    "EXAMPLE": str(HERE),
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "TQ_NUM_THREADS": "1",
    "VERL_USE_EXTERNAL_MODULES": "on_cpus",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
}


def main() -> None:
    """Write the prompts, let verl train, and draw the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--mode", choices=REWARDS, default="filter")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    import tasks

    from assay.models.resolve import resolve
    from assay.vhack.training.page import training_page

    rows = [
        {
            "prompt": [{"role": "user", "content": task.prompt}],
            "data_source": "assay",
            "reward_model": {"ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index, task in enumerate(tasks.TASKS)
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampler = {"folder": folder, "model": tasks.MODEL}
    sampler |= {"arm": options.mode, "detector": tasks.DETECTOR}
    sys.argv = [
        "main_ppo",
        f"--config-dir={HERE}",
        "--config-name=judged",
        f"hydra.run.dir={folder}",
        f"actor_rollout_ref.model.path={resolve(tasks.MODEL).checkpoint}",
        f"data.train_files={prompts}",
        f"data.val_files={prompts}",
        f"reward.custom_reward_function.name={REWARDS[options.mode]}",
        f"trainer.total_training_steps={options.steps}",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"trainer.rollout_data_dir={folder}/rollouts",
        *(f"+trainer.v1.sampler.sampler_kwargs.{name}={value}" for name, value in sampler.items()),
    ]
    from verl.trainer.main_ppo import main as train

    train()
    training_page(folder).write(folder / "page.html")
    print(f"wrote {folder / 'page.html'}")


if __name__ == "__main__":
    main()
