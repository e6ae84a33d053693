"""Engines, which run the model. The prover, the verifier and the service rely only on
:class:`Engine`.
"""
