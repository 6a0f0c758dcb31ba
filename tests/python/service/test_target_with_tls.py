"""`draftwerk chat --target` and `draftwerk bench --target` with a server that has TLS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serve_process import RunningServer, ServerFactory, run_command


def flags(certificates: Path, *, ca: str = "server.pem", certificate: str = "", key: str = "") -> list[str]:
    named = {"--tls-ca": ca, "--tls-certificate": certificate, "--tls-key": key}
    return [part for flag, file in named.items() if file for part in (flag, str(certificates / file))]


@pytest.fixture
def tls_server(server_process: ServerFactory, certificates: Path) -> RunningServer:
    """A server that asks for certificates of its clients."""
    pair = ("--tls-certificate", str(certificates / "server.pem"), "--tls-key", str(certificates / "server.key"))
    return server_process(*pair, "--tls-client-ca", str(certificates / "client.pem"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "a", "turns": ["Hello there"]}) + "\n")
    return path


def test_chat_and_bench_reach_it(tls_server: RunningServer, certificates: Path, prompts: Path) -> None:
    known = flags(certificates, certificate="client.pem", key="client.key")
    target = ("--target", tls_server.address)
    chat = run_command("chat", *target, *known)  # which nobody says anything to
    assert (chat.returncode, chat.stdout, chat.stderr) == (0, "", "")
    bench = run_command("bench", *target, *known, "--prompts", str(prompts), "-n", "4", "--json", "-")
    assert bench.returncode == 0, bench.stderr
    assert json.loads(bench.stdout)["tokens"] == 4
    for command in (["chat"], ["bench", "--prompts", str(prompts)]):
        unknown = run_command(*command, *target, *flags(certificates, ca="client.pem"))
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert f"no connection to {tls_server.address}" in unknown.stderr
        assert unknown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--target localhost:1 --tls-ca none.pem", "--tls-ca none.pem: No such file"),
        ("--target localhost:1 --tls-ca not.pem", "--tls-ca not.pem: no PEM certificates in it"),
        (
            "--target localhost:1 --tls-ca server.pem --tls-certificate client.pem --tls-key server.key",
            "the key does not belong to the certificate",
        ),
        (
            "--target localhost:1 --tls-ca server.pem --tls-certificate client.pem --tls-key encrypted.key",
            "--tls-key encrypted.key: is encrypted",
        ),
        ("--target localhost:1 --tls-ca server.pem --tls-key client.key", "must be given together"),
        ("--target localhost:1 --tls-certificate client.pem --tls-key client.key", "must come with --tls-ca"),
        ("--tls-ca server.pem", "--tls-ca must come with --target"),
    ],
)
def test_options_that_cannot_be_used(
    arguments: str, reason: str, certificates: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(certificates)
    for command in (["chat"], ["bench", "--prompts", str(prompts)]):
        refused = run_command(*command, *arguments.split())
        assert (refused.returncode, refused.stdout) == (2, "")
        assert reason in refused.stderr
        assert refused.stderr.count("\n") == 1
