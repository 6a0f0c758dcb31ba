"""Where a server listens: addresses that have to be free, and TLS files that have to be usable."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import grpc

from draftwerk.pem_files import PemFileError, authorities, certificate_and_key
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
    try:
        certificate, key = certificate_and_key(settings.tls_certificate, settings.tls_key)
        authority = None if settings.tls_client_ca is None else authorities(settings.tls_client_ca, "--tls-client-ca")
    except PemFileError as error:
        raise StartError(str(error)) from None
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)
