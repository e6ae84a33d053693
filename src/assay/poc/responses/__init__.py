"""Responses that can be checked: seeded sampling, sketches, and receipts of what was served.

The noise that chooses a token follows from a seed that no server can choose alone, and is the same
bits everywhere. So one prefill of prompt and output shows, token by token, whether model and
parameters are those that were agreed::

    model = assay.load_model("reference:qwen3")
    sampling = Sampling(temperature=0.7)
    made = respond(
        model, ["def add(a, b):"], block_hash="…", public_key="…", sampling=sampling
    )
    made.save("receipts.jsonl")

docs/responses.md has the formulas and the format.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
