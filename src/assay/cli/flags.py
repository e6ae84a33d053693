"""Spellings of settings that several commands have: their flags, and variables of their own."""

from assay.settings import Flag

OUTPUT = Flag(("-o", "--output"))
MODEL = Flag(variable="ASSAY_MODEL")
DTYPE = Flag(variable="ASSAY_DTYPE")
PINS = Flag(variable="ASSAY_PINS")
LEDGER = Flag(variable="ASSAY_LEDGER")
BLOCK_HASH = Flag(variable="ASSAY_BLOCK_HASH")
PUBLIC_KEY = Flag(variable="ASSAY_PUBLIC_KEY")
