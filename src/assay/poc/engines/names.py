"""Names of engines, known before torch is imported."""

ENGINES = {"hf": "", "vllm": "assay.poc.launch:vllm_engine"}
"""Engines of ``--engine`` and the functions that start them, with the arguments of
:func:`assay.poc.launch.vllm_engine`; the one on transformers is the definition."""


def known_engine(name: str) -> str:
    """Return the name of an engine; a ValueError for another lists them."""
    if name not in ENGINES:
        raise ValueError(" or ".join(map(repr, ENGINES)))
    return name
