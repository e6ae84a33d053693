"""The place of vLLM's extension before 0.3: a server may name it by this module until 0.4."""

from importlib import import_module

WorkerExtension = import_module("assay.poc.vllm").WorkerExtension
