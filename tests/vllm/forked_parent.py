"""Imported by the process that engines are forked from, and by nothing else."""

import _vllm

_vllm.prepare()
