"""Proof of Compute: prove that a model ran, and check such proofs.

A node proves a range of nonces, and a validator that knows block and key recomputes a sample of
them::

    model = assay.load_model("reference:qwen3")
    agreed = Round(block_hash="…", public_key="…")
    proof = assay.poc.prove(model, agreed, nonces=range(256))
    verdict = assay.poc.verify(proof, model, expect=agreed)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
