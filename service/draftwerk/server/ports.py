"""Where a server listens: addresses that have to be free, and TLS files that have to be usable."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path

import grpc

from draftwerk.server.settings import Settings, flag_of


class StartError(Exception):
    """The server cannot start: what is in the way, and what would help."""


def check(settings: Settings) -> None:
    """Finds what would keep a server with these settings from listening, before the time to load a model is spent.

    Raises:
        StartError: an address cannot be listened on, or a TLS file cannot be used.
    """
    for name in ("listen", "operations_listen", "metrics_listen"):
        address = getattr(settings, name)
        if address.startswith("unix:"):
            _check_path(address, name)
        elif address:
            _check_port(address, name)
    credentials_of(settings)


def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, name: str) -> str:
    """Opens a port. Returns its address, with the port that was chosen where 0 was asked for."""
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError:  # taken since check() looked
        raise StartError(f"{flag_of(name)} {address}: in use, or not allowed") from None
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def host_and_port(address: str) -> tuple[str, int]:
    """HOST and PORT of an address that Settings has checked."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_port(address: str, name: str) -> None:
    host, port = host_and_port(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartError(f"{flag_of(name)} {address}: host {host!r} cannot be resolved: {error.strerror}") from None
    failures = []
    for family, kind, protocol, _, socket_address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as gRPC does
                probe.bind(socket_address)
        except OSError as error:
            failures.append(error)
    # A host name may stand for an address that this machine does not have, such as ::1 where there is no IPv6.
    in_the_way = [error for error in failures if error.errno in (errno.EADDRINUSE, errno.EACCES)]
    if in_the_way or len(failures) == len(found):
        raise cannot_listen((in_the_way or failures)[0], address, name)


def _check_path(address: str, name: str) -> None:
    path = Path(address.removeprefix("unix:"))
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            if not path.absolute().parent.is_dir():
                raise StartError(f"{flag_of(name)} {address}: there is no directory {path.absolute().parent}") from None
        except ConnectionRefusedError:  # left over from a server that was killed; gRPC replaces it
            if not path.is_socket():
                raise StartError(f"{flag_of(name)} {address}: there is a file of that name already") from None
        except OSError as error:
            raise StartError(f"{flag_of(name)} {address}: {error.strerror or error}") from None
        else:
            raise cannot_listen(OSError(errno.EADDRINUSE, ""), address, name)


def cannot_listen(error: OSError, address: str, name: str) -> StartError:
    flag = flag_of(name)
    reasons = {
        errno.EADDRINUSE: f"in use: another server listens there. Stop it, or choose another address with {flag}",
        errno.EADDRNOTAVAIL: "not an address of this machine. 0.0.0.0 and [::] stand for all that it has",
        errno.EACCES: f"not allowed: ports below 1024 need privileges. Choose another one with {flag}",
    }
    return StartError(f"{flag} {address}: {reasons.get(error.errno or 0, error.strerror or str(error))}")


def credentials_of(settings: Settings) -> grpc.ServerCredentials | None:
    """The TLS credentials of a server, or None without TLS.

    Raises:
        StartError: a file cannot be used.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    certificate = _contents(settings.tls_certificate, "tls_certificate")
    key = _contents(settings.tls_key, "tls_key")
    authority = None if settings.tls_client_ca is None else _contents(settings.tls_client_ca, "tls_client_ca")
    # gRPC would only say that no address could be bound.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=_no_password)
    except ssl.SSLError as error:
        reason = "the key does not belong to the certificate" if "MISMATCH" in str(error) else "not PEM, or damaged"
        raise StartError(
            f"--tls-certificate {settings.tls_certificate}, --tls-key {settings.tls_key}: {reason}"
        ) from None
    except ValueError:
        raise StartError(f"--tls-key {settings.tls_key}: is encrypted; give it without a passphrase") from None
    if authority is not None:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except ssl.SSLError:
            raise StartError(f"--tls-client-ca {settings.tls_client_ca}: no PEM certificates in it") from None
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)


def _contents(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{flag_of(name)} {path}: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError
