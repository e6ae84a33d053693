"""Starts of a server that are refused: several engines, several API servers."""

import socket
from pathlib import Path

from _vllm import Server

REFUSED = {
    "--data-parallel-size": ("vLLM with 2 data-parallel engines", "start one server per engine"),
    "--api-server-count": ("2 API servers of one engine", "pass --api-server-count 1"),
}


def test_several_engines_or_api_servers_are_refused_in_words_before_anything_is_loaded(tmp_path: Path):
    log = {"VLLM_LOGGING_LEVEL": "INFO"}
    servers = [Server(tmp_path / option, options={option: "2"}, environment=log) for option in REFUSED]
    try:
        for server in servers:
            server.launch()
        for server, (seen, do) in zip(servers, REFUSED.values(), strict=True):
            assert server.process.wait(900) == 1, server.tail()
            said = server.tail()
            assert f"{seen}\n  wanted: " in said
            assert f"\n  to do:  {do}" in said
            assert "EngineCore" not in said
            assert not (server.data_dir / "service.sqlite3").exists()
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    finally:
        for server in servers:
            server.stop()
