"""What keeps a server from starting: addresses, TLS files, the model. And what it listens on when nothing does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve_process import TIMEOUT, InProcess, ServerFactory, failed_serve

import draftwerk
from draftwerk.server.ports import StartError, check
from draftwerk.server.server import Server
from draftwerk.server.settings import Settings


async def is_serving(channel: grpc.aio.Channel) -> bool:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def taken() -> Iterator[str]:
    """A TCP address at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("flag", ["--listen", "--operations-listen", "--metrics-listen"])
def test_a_port_in_use(flag: str, taken: str, tiny_model_path: Path) -> None:
    others = {"--listen": "127.0.0.1:0", "--metrics-listen": ""}
    flags = [part for pair in {**others, flag: taken}.items() for part in pair]
    code, line = failed_serve("--model", str(tiny_model_path), *flags)
    assert code == 1
    assert (
        line
        == f"error: {flag} {taken}: in use: another server listens there. Stop it, or choose another address "
        + (f"with {flag}")
    )


@pytest.mark.parametrize("other", ["localhost", "0.0.0.0", "[::]"])
def test_a_port_in_use_on_another_address_of_the_same_machine(other: str, taken: str) -> None:
    with pytest.raises(StartError, match="in use"):
        check(Settings(listen=f"{other}:{taken.rpartition(':')[2]}", metrics_listen=""))


async def test_no_two_servers_share_a_port(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with inprocess_server(engine) as first:
        monkeypatch.setattr("draftwerk.server.server.check", lambda _: None)  # as if the port was taken after the check
        with pytest.raises(StartError, match="in use, or not allowed"):
            async with inprocess_server(engine, listen=first.address):
                pass


async def test_a_unix_socket(server_process: ServerFactory, tmp_path: Path) -> None:
    path = tmp_path / "draftwerk.sock"
    stale = socket.socket(socket.AF_UNIX)  # as a server that was killed leaves it behind
    stale.bind(str(path))
    stale.close()
    running = server_process("--listen", f"unix:{path}")
    assert running.address == f"unix:{path}"
    async with grpc.aio.insecure_channel(running.address) as channel:
        assert await is_serving(channel)
    with pytest.raises(StartError, match="in use"):
        check(Settings(listen=running.address, metrics_listen=""))


def test_unix_paths_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path, reason in (
        ("file", "there is a file of that name already"),
        ("nowhere/socket", "there is no directory"),
        ("x" * 200, "too long"),
    ):
        with pytest.raises(StartError, match=reason):
            check(Settings(listen=f"unix:{tmp_path / path}", metrics_listen=""))
    assert (tmp_path / "file").read_text() == "precious"


def test_addresses_of_elsewhere() -> None:
    with pytest.raises(StartError, match="not an address of this machine"):
        check(Settings(listen="192.0.2.1:5000", metrics_listen=""))
    with pytest.raises(StartError, match=r"host 'nowhere\.invalid' cannot be resolved"):
        check(Settings(listen="nowhere.invalid:5000", metrics_listen=""))


def test_a_bad_model_path(tmp_path: Path) -> None:
    code, line = failed_serve("--model", str(tmp_path / "nothing"), "--listen", "127.0.0.1:0", "--metrics-listen", "")
    assert code == 2
    assert line.startswith(f"error: {tmp_path / 'nothing'}: no such file or directory")


def test_an_engine_that_cannot_be_made(tiny_model_path: Path) -> None:
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", ""]
    code, line = failed_serve("--model", str(tiny_model_path), "--draft-length", "17", *flags)
    assert code == 2
    assert line == "error: draft_length = 17: must be 0 to max_draft_length = 16"


# --- TLS -------------------------------------------------------------------------------------------------------------


async def test_tls(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess, certificates: Path
) -> None:
    pair = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
    trusted = (certificates / "server.pem").read_bytes()
    anonymous = grpc.ssl_channel_credentials(trusted)
    known = grpc.ssl_channel_credentials(
        trusted, (certificates / "client.key").read_bytes(), (certificates / "client.pem").read_bytes()
    )

    async def works(server: Server, credentials: grpc.ChannelCredentials) -> bool:
        address = server.address.replace("127.0.0.1", "localhost")
        async with grpc.aio.secure_channel(address, credentials) as channel:
            try:
                return await is_serving(channel)
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE
                return False

    async with inprocess_server(engine, **pair) as server:
        assert await works(server, anonymous)
    async with inprocess_server(engine, **pair, tls_client_ca=certificates / "client.pem") as server:
        assert await works(server, known)
        assert not await works(server, anonymous)


@pytest.mark.parametrize(
    ("certificate", "key", "authority", "reason"),
    [
        ("none.pem", "server.key", None, r"--tls-certificate .*none\.pem: No such file"),
        ("server.pem", "none.key", None, r"--tls-key .*none\.key: No such file"),
        ("server.pem", "client.key", None, "the key does not belong to the certificate"),
        ("not.pem", "server.key", None, "not PEM, or damaged"),
        ("server.pem", "not.pem", None, "not PEM, or damaged"),
        ("server.pem", "encrypted.key", None, "is encrypted"),
        ("server.pem", "server.key", "none.pem", r"--tls-client-ca .*none\.pem: No such file"),
        ("server.pem", "server.key", "not.pem", "no PEM certificates in it"),
    ],
)
def test_tls_files_that_cannot_be_used(
    certificate: str, key: str, authority: str | None, reason: str, certificates: Path
) -> None:
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_listen="",
        tls_certificate=certificates / certificate,
        tls_key=certificates / key,
        tls_client_ca=None if authority is None else certificates / authority,
    )
    with pytest.raises(StartError, match=reason):
        check(settings)
