"""The blocks in which vLLM keeps the states of requests: which ones a step writes and reads, and what they hold."""

SPOILT = 1e4


def watch(worker):
    """Keep, inside vLLM's worker, what every step does with the states of prompts, from now on."""
    from vllm.forward_context import get_forward_context

    batch, kept = worker.model_runner.input_batch, []
    worker.assay_states = kept

    def before(_module, _args, _kwargs):
        for part in (get_forward_context().attn_metadata or {}).values():
            blocks = getattr(part, "state_indices_tensor_p", None)
            if blocks is not None:
                names = batch.req_ids[part.num_decodes : part.num_decodes + part.num_prefills]
                kept.append([list(row) for row in zip(names, blocks.tolist(), reads(part), strict=True)])
                return

    worker.model_runner.model.register_forward_pre_hook(before, with_kwargs=True)


def reads(part):
    """Return for every prompt of a step whether its block is read."""
    found = part.has_initial_states_p
    return [False] * part.num_prefills if found is None else found.tolist()


def take(worker):
    """Return the prompts of every step since the last time: request, block, whether it is read."""
    found, worker.assay_states[:] = list(worker.assay_states), []
    return found


def spoil(worker):
    """Write a number into every value of every state, also into block 0, which vLLM gives to no request."""
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if isinstance(layer.kv_cache, (list, tuple)):
            for part in layer.kv_cache:
                part.fill_(SPOILT)
