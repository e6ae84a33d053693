"""The protocol: rounds, pipelines, the transforms between a hidden state and a published value, and proof files."""

from assay.poc.protocol._blocks import BlockFactor, block_factor, block_scale, folded_head, has_block_factor
from assay.poc.protocol._build import Build, described
from assay.poc.protocol._pack import Pack, Row, packs
from assay.poc.protocol._pins import FEWEST_NONCES, Pins
from assay.poc.protocol._pins_file import NetworkPins
from assay.poc.protocol._pins_tables import UNFILLED, ModelPins, NodePins, PinnedFile, RoundPins
from assay.poc.protocol._pins_text import BUILD_FIELDS, pins_text
from assay.poc.protocol._pipelines import PIPELINES, LayerStep, Pipeline, Positions, Step, get_pipeline
from assay.poc.protocol._proof import Proof, parse_model, parse_record_line
from assay.poc.protocol._record import (
    DistanceRecord,
    Fingerprint,
    Footer,
    Header,
    Record,
    VectorRecord,
    check_distinct_seeds,
    decode_vector,
    encode_vector,
    is_distance,
    is_valid,
)
from assay.poc.protocol._round import MAX_COUNT, MAX_NONCE, Round, check_name, check_number, prefixed
from assay.poc.protocol._sketches import SKETCH_EVERY, SKETCH_SIZE, sketch_steps, sketches
from assay.poc.protocol._strict import check_fields, malformed, malformed_line, numbered_lines, parse_line
from assay.poc.protocol._transforms import (
    ROWS_OF_A_PRODUCT,
    Transform,
    block_target,
    project,
    reflect,
    unit,
    weighted_sum,
)
from assay.stats import RANDOM_HEAD_ROWS

__all__ = [
    "BUILD_FIELDS",
    "FEWEST_NONCES",
    "MAX_COUNT",
    "MAX_NONCE",
    "PIPELINES",
    "RANDOM_HEAD_ROWS",
    "ROWS_OF_A_PRODUCT",
    "SKETCH_EVERY",
    "SKETCH_SIZE",
    "UNFILLED",
    "BlockFactor",
    "Build",
    "DistanceRecord",
    "Fingerprint",
    "Footer",
    "Header",
    "LayerStep",
    "ModelPins",
    "NetworkPins",
    "NodePins",
    "Pack",
    "PinnedFile",
    "Pins",
    "Pipeline",
    "Positions",
    "Proof",
    "Record",
    "Round",
    "RoundPins",
    "Row",
    "Step",
    "Transform",
    "VectorRecord",
    "block_factor",
    "block_scale",
    "block_target",
    "check_distinct_seeds",
    "check_fields",
    "check_name",
    "check_number",
    "decode_vector",
    "described",
    "encode_vector",
    "folded_head",
    "get_pipeline",
    "has_block_factor",
    "is_distance",
    "is_valid",
    "malformed",
    "malformed_line",
    "numbered_lines",
    "packs",
    "parse_line",
    "parse_model",
    "parse_record_line",
    "pins_text",
    "prefixed",
    "project",
    "reflect",
    "sketch_steps",
    "sketches",
    "unit",
    "weighted_sum",
]
