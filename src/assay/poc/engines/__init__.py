"""Engines, which run the model. Prover, verifier and service rely only on :class:`Engine`."""
