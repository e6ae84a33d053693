"""Tables of ten thousand nodes: read as the parser reads the whole text, and parsed once each."""

import random
import tomllib

import pytest

from assay.errors import DataError
from assay.poc.protocol.node_tables import read_node_tables

PLAIN = ["# pins", "[round]", "length = 8", "[[nodes]]", "key = 'a'", "id = 1", "id = [\n1,"]
ODD = (
    "[[nodes]]| [[nodes]]|[nodes.of]|  [nodes.of]|[nodes]|nodes = 1|[[nodes.of]]|]|x = "
    "[|[1],|[[nodes]] # a|"
)
ODD += (
    f"[[nodes]]\r||t = {3 * chr(34)}|{3 * chr(34)}|u = {3 * chr(39)}|{3 * chr(39)}|y = 0x{'f' * 16}"
)


@pytest.mark.slow
def test_cached_tables_are_those_that_the_parser_reads_from_the_whole_text(tmp_path):
    chance = random.Random(0)
    path = tmp_path / "pins.toml"
    with_several_nodes = 0
    for _ in range(4000):
        pieces = chance.choices(PLAIN, k=chance.randrange(12))
        pieces += chance.choices(ODD.split("|"), k=chance.randrange(3))
        chance.shuffle(pieces)
        text = "\n".join(pieces)
        path.write_bytes(text.encode())
        try:
            expected = tomllib.loads(text)
            reason = ""
        except ValueError as fault:
            reason = str(fault)  # with the line of the whole text
        if reason:
            with pytest.raises(DataError) as refusal:
                read_node_tables(path)
            assert reason in refusal.value.seen
            continue
        try:
            tables = read_node_tables(path)
        except DataError:
            assert "0xffffffffffffffff" in text  # which the parser alone takes
            continue
        assert tables == expected
        with_several_nodes += str(tables.get("nodes")).count("{") > 1
    assert with_several_nodes > 50


def test_a_change_of_one_node_parses_that_node(tmp_path, monkeypatch):
    """Parsing ten thousand of them held every message up for half a second."""
    parsed = []
    loads = tomllib.loads
    path = tmp_path / "pins.toml"
    monkeypatch.setattr(tomllib, "loads", lambda text: parsed.append(text) or loads(text))
    tables = [f'[[nodes]]\nkey = "changed_{i}"\n' for i in range(1000)]
    path.write_text("schema = 1\n" + "".join(tables) + "[round]\nseq_len = 8\n")
    read_node_tables(path)
    del parsed[:]
    tables[7] = '[[nodes]]\nkey = "another"\n'
    path.write_text("schema = 1\n" + "".join(tables) + "[round]\nseq_len = 9\n")
    changed = read_node_tables(path)
    assert changed["round"] == {"seq_len": 9}
    assert changed["nodes"][7] == {"key": "another"}
    assert len(changed["nodes"]) == 1000
    assert sum(map(len, parsed)) < 200
