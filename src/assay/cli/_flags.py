"""Flags that several commands share."""

from typing import Annotated

import typer

__all__ = [
    "DeviceFlag",
    "DtypeFlag",
    "GradientDtypeFlag",
    "KernelsFlag",
    "ModelFlag",
    "NumberFormatFlag",
    "PairsArgument",
    "PairsFlag",
]

ModelFlag = Annotated[
    str, typer.Option("--model", help="A directory, a hub id, reference:… or shape:…", envvar="ASSAY_MODEL")
]
DtypeFlag = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.", envvar="ASSAY_DTYPE")]
NumberFormatFlag = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16, bfloat16, or weights in int8 or float8.", envvar="ASSAY_DTYPE"),
]
GradientDtypeFlag = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16.", envvar="ASSAY_DTYPE")]
DeviceFlag = Annotated[str | None, typer.Option("--device", help="cpu or cuda.", envvar="ASSAY_DEVICE")]
KernelsFlag = Annotated[str, typer.Option(help="Kernels: compiled, eager, or auto (compiled on CUDA).")]

_PAIRS = "authored, generated:N, environment:N, exploits:N, or a pair file."
PairsFlag = Annotated[str, typer.Option("--pairs", help=_PAIRS)]
PairsArgument = Annotated[str, typer.Argument(help=_PAIRS)]
