"""Results in and out: strict JSON Lines, crash-safe files, self-contained HTML, and where a result comes from."""

from assay.reports._figures import (
    INK,
    MUTED,
    SERIES,
    bands,
    figure,
    heatmap,
    histogram_over_density,
    legend,
    style_axes,
)
from assay.reports._html import Badge, BadgeKind, Cell, Report
from assay.reports._jsonl import (
    JsonObject,
    dumps,
    is_deep,
    loads,
    read_json,
    read_jsonl,
    read_lines,
    read_whole,
    unique_keys,
)
from assay.reports._provenance import provenance
from assay.reports._storage import PartialFile, check_new_file, storage_error, write_atomic, write_jsonl
from assay.reports._toml import parse_toml, read_toml

__all__ = [
    "INK",
    "MUTED",
    "SERIES",
    "Badge",
    "BadgeKind",
    "Cell",
    "JsonObject",
    "PartialFile",
    "Report",
    "bands",
    "check_new_file",
    "dumps",
    "figure",
    "heatmap",
    "histogram_over_density",
    "is_deep",
    "legend",
    "loads",
    "parse_toml",
    "provenance",
    "read_json",
    "read_jsonl",
    "read_lines",
    "read_toml",
    "read_whole",
    "storage_error",
    "style_axes",
    "unique_keys",
    "write_atomic",
    "write_jsonl",
]
