"""Imported by the process that engines are forked from, and by nothing else."""

import _vllm_forked

_vllm_forked.prepare()
