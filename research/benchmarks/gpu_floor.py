"""What a batch takes at least on one CUDA device: its products, its attention, and the traffic
between them.

All are those of the shapes of a model, by torch's own kernels on random data:

- *products*: the four of every layer, with queries, keys and values as one and gate and up as one;
  in bfloat16 through `linear`, in float8 through torch's product with scales by row, whose inputs
  are rounded before the clock starts;
- *attention*: causal, through the kernel that the engine takes, in bfloat16 in both formats;
- *traffic*: copies of as many bytes as the steps between the products must read and write if each
  passes once over memory: queries and keys turned, two sums with their norms, the activated gate,
  and in float8 the output of attention rounded. What the next product reads in float8 counts one
  byte. In a mixture, rows also go to their experts and back.

Each part is timed alone and all of them in the order of a layer, in turns; the device slows down
under products alone, which draw the most power. The floor is the time of all in order. `whole` has
every layer for every position; `prove` is the work that `prove` does: of its last layer, only keys
and values are for every position. It is no bound for a kernel that takes a step between products
into a product, as an update of the residual stream is.

    python research/benchmarks/gpu_floor.py --model shape:qwen3-0.6b -o floor.json
"""

import statistics

import torch
from _common import event_seconds, note, parser, publish
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.models import load_model
from assay.models.decoder import causal_attention, decoder_layers
from assay.models.eight_bits import FLOAT8, Rounded, grouped_product, round_rows
from assay.poc.engines.hf.lean_decoder import layer_shape, layer_weights, parted
from assay.poc.engines.hf.shapes import auto_batch

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]  # the engine's
PROJECTIONS = ("qkv", "o_proj", "gate_up", "down_proj")
MLP = PROJECTIONS[2:]


def seconds_of(function, seconds):
    """Time of one call on the device, from as many as fill the seconds."""
    function()
    return event_seconds(function, max(2, int(seconds / event_seconds(function))))


def weights_of(model):
    """The projections of every layer."""
    layers = [layer_weights(layer) for layer in decoder_layers(model.module)]
    return [{name: getattr(layer, name) for name in PROJECTIONS} for layer in layers]


class Floor:
    """The parts of a batch's work on a model's shapes."""

    def __init__(self, model, batch_size, seq_len):
        self.shape = layer_shape(decoder_layers(model.module)[0])
        self.layers = weights_of(model)
        self.batch_size, self.seq_len, self.rows = batch_size, seq_len, batch_size * seq_len
        self.width = self.shape.head_width
        self.hidden = model.hidden_size
        self.chosen = self.shape.chosen  # experts of a position; 0 without a mixture
        self.mlp = self.layers[0]["down_proj"][0].shape[-1]
        # Positions of the experts are as many as all choices, and each expert has as many as any
        # other.
        copies = {name: self.chosen or 1 if name in MLP else 1 for name in PROJECTIONS}
        shapes = {(weight.shape[-1], copies[name]) for name, (weight, _) in self.layers[0].items()}
        self.inputs = {shape: self._random(shape[0], self.rows * shape[1]) for shape in shapes}
        self.copies = copies
        heads = self.shape.heads + 2 * self.shape.key_heads
        self.qkv = self._random(heads * self.width).view(batch_size, seq_len, heads, self.width)
        numbers = self.rows * max(self.bytes_of_a_layer("bfloat16").values()) // 4
        self.copied = torch.empty(numbers, dtype=torch.bfloat16, device="cuda").normal_()
        self.copy = torch.empty_like(self.copied)

    def _random(self, columns, rows=None):
        return torch.randn(rows or self.rows, columns, dtype=torch.bfloat16, device="cuda")

    def in_float8(self, rounded):
        """Take the weights of a rounded model, and round the inputs."""
        self.layers = weights_of(rounded)
        self.inputs = {shape: round_rows(x) for shape, x in self.inputs.items()}

    def _product(self, layer, name, part=None, positions=None):
        projection = layer[name]
        if part is not None:
            projection = parted(projection, self.shape.heads * self.width, None)[part]
        weight, bias = projection
        columns = (weight.values if isinstance(weight, Rounded) else weight).shape[-1]
        inputs = slice((positions or self.rows) * self.copies[name])
        x = self.inputs[columns, self.copies[name]]
        x = Rounded(*(part[inputs] for part in x)) if isinstance(x, Rounded) else x[inputs]
        if self.chosen and name in MLP:
            return self._grouped(x, weight)
        if isinstance(weight, Rounded):
            return FLOAT8.product(x, weight, bias, torch.bfloat16)
        return functional.linear(x, weight, bias)

    def _grouped(self, x, weights):
        tensor, count = (
            (x.values, len(weights.values)) if isinstance(weights, Rounded) else (x, len(weights))
        )
        ends = torch.arange(1, count + 1, device="cuda", dtype=torch.int32) * (len(tensor) // count)
        if isinstance(weights, Rounded):
            return grouped_product(x, weights, ends, torch.bfloat16)
        return torch._grouped_mm(x, weights.transpose(-2, -1), offs=ends)

    def products(self):
        """All products of a layer, for each layer but the last."""
        for layer in self.layers[:-1]:
            for name in PROJECTIONS:
                self._product(layer, name)

    def last_products(self):
        """The products of a last layer for the last position."""
        layer = self.layers[-1]
        self._product(layer, "qkv", part=1)
        for name in PROJECTIONS:
            self._product(layer, name, part=0 if name == "qkv" else None, positions=self.batch_size)

    def attention(self):
        """Attention, for each layer but the last."""
        for _ in self.layers[:-1]:
            self._attend()

    def _attend(self):
        counts = [self.shape.heads, self.shape.key_heads, self.shape.key_heads]
        causal_attention(*self.qkv.split(counts, dim=2), self.shape.scale)

    def bytes_of_a_layer(self, name):
        """Bytes that the step after each product, and after attention, reads and writes for each
        position.
        """
        to_product = 1 if name == "float8" else 2
        heads = (self.shape.heads + self.shape.key_heads) * self.width
        rounded = (2 + to_product) * self.shape.heads * self.width if name == "float8" else 0
        sum_and_norm = (6 + to_product) * self.hidden
        if not self.chosen:
            return {
                "qkv": 4 * heads,
                "attention": rounded,
                "o_proj": sum_and_norm,
                "gate_up": (4 + to_product) * self.mlp,
                "down_proj": sum_and_norm,
            }
        to_experts = (2 + self.chosen * to_product) * self.hidden
        return {
            "qkv": 4 * heads,
            "attention": rounded,
            "o_proj": 8 * self.hidden + to_experts,  # the router reads the norm unrounded
            "gate_up": self.chosen * (4 + to_product) * self.mlp,
            "down_proj": (2 + 2 * self.chosen) * self.hidden + sum_and_norm,
        }

    def _copy(self, count):
        numbers = self.rows * count // 4  # read and written, two bytes each
        self.copy[:numbers].copy_(self.copied[:numbers])

    def traffic(self, name):
        """Copies of the bytes of a layer, for each layer but the last."""
        for _ in self.layers[:-1]:
            for count in filter(None, self.bytes_of_a_layer(name).values()):
                self._copy(count)

    def in_order(self, name):
        """Everything, in the order of a layer."""
        counts = self.bytes_of_a_layer(name)
        for layer in self.layers[:-1]:
            for projection in PROJECTIONS:
                self._product(layer, projection)
                self._copy(counts[projection])
                if projection == "qkv":
                    self._attend()
                    if counts["attention"]:
                        self._copy(counts["attention"])
        self.last_products()


@torch.inference_mode()
def measure_floor(model, rounded, batch_size, seq_len, *, seconds=0.5, rounds=3):
    """Milliseconds of the parts of a batch, and the nonces per second that they allow, in each
    number format.
    """
    parts = Floor(model, batch_size, seq_len)
    result = {}
    for name in ("bfloat16", *(["float8"] if rounded else [])):
        if name == "float8":
            parts.in_float8(rounded)
        timed = {
            "products": parts.products,
            "last_products": parts.last_products,
            "attention": parts.attention,
            "traffic": lambda name=name: parts.traffic(name),
            "in_order": lambda name=name: parts.in_order(name),
        }
        times = {part: [] for part in timed}
        with sdpa_kernel(ATTENTION, set_priority=True):
            for _ in range(rounds):
                for part, function in timed.items():
                    times[part].append(seconds_of(function, seconds))
        medians = {part: statistics.median(values) for part, values in times.items()}
        result[name] = _summary(parts, medians, name)
        note(f"{name}: {result[name]}")
    return result


def _summary(parts, times, name):
    """Floors from the times: of all layers for all positions, and of the work that prove does."""
    count = len(parts.layers) - 1
    copied = count * parts.rows * sum(parts.bytes_of_a_layer(name).values())
    summary = {
        part: times[part] * (count + 1) / count for part in ("products", "attention", "traffic")
    }
    summary["in_order"] = (times["in_order"] - times["last_products"]) * (count + 1) / count
    prove = times | {"products": times["products"] + times["last_products"]}
    figures = {"copy_tb_per_second": round(copied / times["traffic"] / 1e12, 3)}
    for work, spent in (("whole", summary), ("prove", prove)):
        alone = spent["products"] + spent["attention"]
        figures[work] = {
            **{
                f"{part}_ms": round(spent[part] * 1e3, 3)
                for part in ("products", "attention", "traffic", "in_order")
            },
            "products_and_attention_nonces_per_second": round(parts.batch_size / alone, 1),
            "parts_alone_nonces_per_second": round(
                parts.batch_size / (alone + spent["traffic"]), 1
            ),
            "floor_nonces_per_second": round(parts.batch_size / spent["in_order"], 1),
        }
    return figures


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="shape:qwen3-0.6b")
    arguments.add_argument(
        "--batch-size", type=int, default=0, help="0 takes what prove takes by itself"
    )
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--seconds", type=float, default=0.5, help="of every timing")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    model, rounded = (
        load_model(options.model, dtype="bfloat16", device="cuda", quantise=quantise)
        for quantise in (None, "float8")
    )
    batch = options.batch_size or auto_batch(model, options.seq_len)
    figures = measure_floor(
        model, rounded, batch, options.seq_len, seconds=options.seconds, rounds=options.rounds
    )
    shape = {"model": options.model, "batch_size": batch, "seq_len": options.seq_len}
    publish("gpu_floor", {**shape, "formats": figures}, options.output)


if __name__ == "__main__":
    main()
