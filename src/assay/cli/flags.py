"""Spellings of settings that several commands have: their options, units, variables and words."""

from typing import Annotated, Literal

from assay.settings import Flag

ARGUMENT = Flag(argument=True)
OUTPUT = Flag(("-o", "--output"))
MODEL = Flag(variable="ASSAY_MODEL", unit="MODEL")
DTYPE = Flag(variable="ASSAY_DTYPE", unit="DTYPE")
PINS = Flag(variable="ASSAY_PINS")
LEDGER = Flag(variable="ASSAY_LEDGER")
HASH, KEY, TEXT, NUMBER = Flag(unit="HASH"), Flag(unit="KEY"), Flag(unit="TEXT"), Flag(unit="NUMBER")
NONCES, POSITIONS, RESPONSES = Flag(unit="NONCES"), Flag(unit="POSITIONS"), Flag(unit="RESPONSES")
TOKENS, PAIRS, AXES = Flag(unit="TOKENS"), Flag(unit="PAIRS"), Flag(unit="AXES")
PROBABILITY, FACTOR, DISTANCE = Flag(unit="PROBABILITY"), Flag(unit="FACTOR"), Flag(unit="DISTANCE")

EngineName = Literal["hf", "vllm"]
KernelName = Literal["auto", "compiled", "eager"]
NumberFormat = Annotated[Literal["float32", "float16", "bfloat16", "int8", "float8"] | None, DTYPE]
FORMATS = "Number format of the weights: float32, float16, bfloat16, int8 or float8"
MODEL_HELP = "Model: a directory, a hub id, reference:… or shape:…"
