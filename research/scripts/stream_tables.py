"""Print the tables of docs/streams.md, from the committed results."""

from tables import RESULTS, print_table

from assay.files.jsonl import read_json


def gumbels() -> None:
    """Print what Gumbel numbers cost a core, beside torch's numbers without seeds and a step of decoding."""
    header = ("rows", "numbers", "`torch.rand`", "noise of a step", "`exponential_`", "the model's step")
    names = ("gumbels", "torch_rand", "step", "torch_exponential")
    figures = read_json(RESULTS / "gumbel_cpu.json")
    decoding = {row["batch"]: f"{row['decode_ms']:.0f} ms" for row in figures["decoding"]["batches"]}
    rows = [
        (row["batch"], *(f"{row[f'{name}_ms']:.2f} ms" for name in names), decoding.get(row["batch"], ""))
        for row in figures["batches"]
    ]
    print_table(header, rows)
