"""``pins.toml``: what it says of a round, and what it refuses."""

from pathlib import Path

import pytest

from assay.errors import DataError, ProofMismatch, UsageError
from assay.poc import NetworkPins, Proof
from tests.wordings import refuses

ANY = ("device", "attention", "batch_size", "threads", "torch", "library", "kernels")


def text_of(
    proof: Proof, *, nodes: str = "", round: str = "", model: str = "", build: str = ""
) -> str:
    """The pins of a proof's network, on any machine, with further lines in their tables."""
    free = "".join(f'{name} = "*"\n' for name in ANY if f"{name} =" not in build)
    return (
        f'schema = 1\n[round]\npreset = "poc-2.0"\nseq_len = 16\nstrength = 32\nr_target = '
        f"1.416\nnode_count = 1\n"
        f"fewest_nonces = 32\n{round}\n{nodes}\n"
        f'[[models]]\nreference = "small"\ndigest = "{proof.header.digest}"\n{model}\n'
        f'[[models.builds]]\nengine = "hf"\ndtype = "float32"\n{free}{build}\n'
    )


@pytest.fixture
def written(tmp_path: Path, proof: Proof):
    """Write and read the pins of the proof's network."""

    def write(text: str | None = None, **tables: str) -> NetworkPins:
        path = tmp_path / "pins.toml"
        path.write_text(text_of(proof, **tables) if text is None else text)
        return NetworkPins.load(path)

    return write


def test_a_round_takes_the_rest_from_the_file(written, proof: Proof):
    pins = written().for_round(block_hash="block_alpha", public_key="node_A")
    pins.check(proof.header)
    assert pins.unpinned(proof.header) == ()
    assert (pins.seq_len, pins.node_id, pins.node_count, pins.formats) == (16, 0, 1, ("float32",))
    assert written().for_round().unpinned(proof.header) == ("block_hash", "public_key")


def test_nodes_are_a_list_of_those_who_may_prove(written, proof: Proof):
    nodes = '[[nodes]]\npublic_key = "node_A"\nnode_id = 0\n'
    network = written(nodes=nodes)
    assert network.for_round(block_hash="b").public_key == "node_A"
    with refuses(UsageError, "nodes are a list of those who may prove"):
        network.for_round(public_key="node_B")
    with refuses(UsageError, "nodes are a list of those who may prove, 2"):
        network.for_round(public_key="node_A", node_id=1)
    several = written(
        nodes=nodes + '[[nodes]]\npublic_key = "node_B"\nnode_id = 3\nnode_count = 4\n'
    )
    with refuses(UsageError, "nodes are a list of those who may prove, 3"):
        several.for_round()
    pins = several.for_round(public_key="node_B")
    assert (pins.node_id, pins.node_count) == (3, 4)
    with refuses(ProofMismatch, "nodes are a list of those who may prove, 4"):
        pins.check(proof.header)


def nodes(*tables: str) -> tuple[str, str]:
    """What a list of nodes replaces in a file."""
    return "[[models]]", "".join(f"[[nodes]]\n{table}\n" for table in tables) + "[[models]]"


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("schema = 1", "schema = 2", "schema 2"),
        ("schema = 1\n", "", "schema None"),
        ("preset", "prest", "did you mean preset"),
        ("[round]", "[rounds]", "did you mean round"),
        ('engine = "hf"', 'engine = "?"', r"models\[0\].builds\[0\].engine is still"),
        ('engine = "hf"\n', "", r"no models\[0\].builds\[0\].engine"),
        ('dtype = "float32"', 'dtype = "*"', r"models\[0\].builds\[0\].dtype\[0\] is '\*'"),
        ('engine = "hf"', 'engine = ""', r"models\[0\].builds\[0\].engine\[0\] is ''"),
        ('engine = "hf"', 'engine = "\\u0007"', r"models\[0\].builds\[0\].engine\[0\] is '.x07'"),
        ('threads = "*"', "threads = true", r"models\[0\].builds\[0\].threads"),
        ('batch_size = "*"', "batch_size = 0", r"models\[0\].builds\[0\].batch_size\[0\] is 0"),
        ('threads = "*"', "threads = []", r"models\[0\].builds\[0\].threads is \[\]"),
        ("seq_len = 16", "seq_len = 0", "round.seq_len is 0"),
        ("seq_len = 16", "seq_len = 16.0", "round.seq_len is 16.0"),
        ("seq_len = 16", "seq_len = 2097152", "seq_len is 2097152"),
        ("strength = 32", "strength = 64", "round.strength is 64"),
        ("r_target = 1.416", "r_target = 3.0", "r_target is 3.0"),
        ("r_target = 1.416", "r_target = nan", "round.r_target is nan"),
        ("r_target = 1.416\n", "", "round.r_target None with preset poc-2.0"),
        ('preset = "poc-2.0"', 'preset = "artifact"', "round.r_target 1.416 with preset artifact"),
        ('preset = "poc-2.0"', 'preset = "poc-3"', "preset 'poc-3'"),
        ("fewest_nonces = 32", "nonces = [4, 4]\nfewest_nonces = 32", "nonce positions 4:4"),
        ("schema = 1", "schema = 1\nschema = 1", "Cannot overwrite"),
        ('digest = "', 'digest = "x', r"models\[0\].digest is 'x"),
        (*nodes('public_key = "a"\nnode_id = 2'), "node_id is 2"),
        (*nodes('public_key = "a"\nnode_id = 0', 'public_key = "a"\nnode_id = 1'), "node"),
        (
            *nodes('public_key = "a"\nnode_id = 0', 'public_key = "a"\nnode_id = 0'),
            "node 'a' with 0, 2 times",
        ),
        (
            *nodes(
                'public_key = "a"\nnode_id = 0', 'public_key = "a"\nnode_id = 1\nnode_count = 2'
            ),
            "node_count 1 and 2",
        ),
        (*nodes('public_key = ""\nnode_id = 0'), r"nodes\[0\].public_key is ''"),
        (*nodes('public_key = "*"\nnode_id = 0'), r"nodes\[0\].public_key is '\*'"),
        (*nodes('public_key = "a"'), r"no nodes\[0\].node_id"),
    ],
)
def test_what_is_not_exactly_a_pins_file_is_refused_by_its_key(
    old: str, new: str, seen: str, written, proof: Proof
):
    text = text_of(proof)
    assert old in text
    with pytest.raises(DataError, match=seen) as caught:
        written(text.replace(old, new, 1))
    assert "pins.toml" in caught.value.seen


def test_a_number_beyond_those_of_toml_is_refused(written, proof: Proof):
    """Python reads any number in hexadecimal digits, and cannot write one of more than 4300 decimal
    digits.
    """
    with refuses(DataError, "a number beyond those of toml is refused") as refused:
        written(text_of(proof).replace("seq_len = 16", f"seq_len = 0x{'f' * 5000}"))
    assert refused.value.wanted == "a TOML file"


def test_models_are_told_apart_by_digest_or_name(written, proof: Proof):
    digest = proof.header.digest
    other = "0" * 64
    text = text_of(proof)
    second = text[text.index("[[models]]") :].replace(digest, other)
    network = written(text + second)
    assert network.for_round(model=other).digest == other
    for name, seen in (
        (None, "one of 2 models"),
        ("small", "one of 2 models"),
        ("large", "which .* does not have"),
    ):
        with pytest.raises(UsageError, match=seen):
            network.for_round(model=name)
    named = written(text + second.replace('"small"', '"large"'))
    assert named.for_round(model="large").digest == other
    with refuses(DataError, "models are told apart by digest or name"):
        written(text + second.replace(other, digest))


def test_a_node_is_bound_to_its_build(written, proof: Proof):
    node = '[[nodes]]\npublic_key = "node_A"\nnode_id = 0\nbuild = "{}"\n'
    network = written(nodes=node.format("own"), build='name = "own"\ndevice = "a quiet one"')
    with refuses(ProofMismatch, "a node is bound to its build"):
        network.for_round(block_hash="block_alpha", public_key="node_A").check(proof.header)
    with refuses(DataError, "a node is bound to its build, 2"):
        written(nodes=node.format("another"), build='name = "own"')


def test_shares_without_a_list_are_named_by_the_validator(written, proof: Proof):
    network = written(text_of(proof).replace("node_count = 1", "node_count = 4"))
    with refuses(UsageError, "shares without a list are named by the validator"):
        network.for_round(public_key="node_A")
    assert network.for_round(public_key="node_A", node_id=3).node_id == 3
    assert network.for_round(public_key="node_A", node_id=4).node_id == 4  # numbers from 1
    with refuses(UsageError, "shares without a list are named by the validator, 2"):
        network.for_round(public_key="node_A", node_id=5)
    assert network.foreign("anyone", 2, 4) == ()
    assert network.foreign("anyone", 0, 1) == ("node_count",)


@pytest.mark.parametrize("file", ["/absolute.json", ""])
def test_files_lie_beside_the_pins(file: str, written, proof: Proof):
    model = f'[[models.calibrations]]\nfile = "{file}"\nsha256 = "{"0" * 64}"\n'
    with refuses(DataError, "files lie beside the pins"):
        written(text_of(proof) + model)


def test_a_file_that_never_ends_is_not_read(tmp_path: Path):
    for size, seen in ((2**22 + 1, "longer than 4194304 bytes"), (0, "schema None")):
        path = tmp_path / "pins.toml"
        path.write_bytes(b"#" * size)
        with pytest.raises(DataError, match=seen):
            NetworkPins.load(path)
    path.write_bytes(b'schema = "\xff"')
    with refuses(DataError, "a file that never ends is not read"):
        NetworkPins.load(path)
    path.write_text("schema = " + "[" * 200_000)
    with refuses(DataError, "a file that never ends is not read, 2"):
        NetworkPins.load(path)
