"""Print the tables of docs/streams.md, from the committed results."""

from tables import RESULTS, print_table

from assay.reports import read_json


def gumbels() -> None:
    """Print what Gumbel numbers cost a core, beside torch's numbers without seeds."""
    header = ("rows", "numbers", "`torch.rand`", "noise of a step", "`exponential_`")
    names = ("gumbels", "torch_rand", "step", "torch_exponential")
    rows = read_json(RESULTS / "gumbel_cpu.json")["batches"]
    print_table(header, [(row["batch"], *(f"{row[f'{name}_ms']:.2f} ms" for name in names)) for row in rows])
