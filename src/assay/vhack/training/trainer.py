"""The trainer of ``assay vhack train``, for a script with a ``GRPOConfig`` of one's own; importing it imports TRL.

It logs the shares of each source, mixes stored rollouts in, keeps δS in its checkpoints and goes on from them::

    adapter = DeltaS(model, svd)
    optimizer = ProjectedOptimizer(torch.optim.AdamW(adapter.delta, lr=0.015), adapter, basis, arm=arm, max_norm=1.0)
    reward = OwnReward(tasks, pay, optimizer.arm)
    config = GRPOConfig("run", max_steps=100, max_grad_norm=0.0, shuffle_dataset=False, bf16=False)
    trainer = GRPO(adapter, optimizer, reward, config, prompts=800, processing_class=tokenizer, axes=(basis, None))
    checkpoint, done = last_checkpoint(Path("run"))
    log = TrainLog(Path("run/log.jsonl"), {}, step=done)
    trainer.add_callback(StepLog(trainer, log, console=print))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
"""

"""Classes for a script of one's own."""
