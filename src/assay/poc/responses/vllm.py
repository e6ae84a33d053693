"""The name before 0.3 of :mod:`assay.poc.vllm`, which servers may still use for extension and processors until 0.4."""

from assay.poc.engines.vllm import __getattr__ as __getattr__
