"""A server that runs already, as --target names it, and TLS on the way there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from draftwerk.cli.failures import usage_error

if TYPE_CHECKING:
    import grpc

TlsCa = Annotated[
    Optional[Path],
    typer.Option(
        "--tls-ca",
        help="With --target: connect by TLS. CA certificates, PEM: the server must have a certificate of one of these.",
        metavar="FILE",
    ),
]
TlsCertificate = Annotated[
    Optional[Path],
    typer.Option(
        "--tls-certificate",
        help="With --tls-ca: certificate chain, PEM, to show to a server that asks for one.",
        metavar="FILE",
    ),
]
TlsKey = Annotated[
    Optional[Path], typer.Option("--tls-key", help="Its private key, PEM, not encrypted.", metavar="FILE")
]


def credentials_for(
    target: str | None, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None
) -> grpc.ChannelCredentials | None:
    """What a client of the target connects with; None: no encryption. Imports gRPC for TLS alone: it takes its time.

    Raises:
        CommandError: options that do not go together.
        PemFileError: a file that cannot be used.
    """
    if (tls_certificate is None) != (tls_key is None):
        raise usage_error("--tls-certificate and --tls-key must be given together")
    if tls_certificate is not None and tls_ca is None:
        raise usage_error("--tls-certificate and --tls-key must come with --tls-ca, which says whom to trust")
    if tls_ca is None:
        return None
    if target is None:
        raise usage_error("--tls-ca must come with --target: a server of this command's own has no TLS")
    import grpc

    from draftwerk.pem_files import authorities, certificate_and_key

    trusted = authorities(tls_ca, "--tls-ca")
    if tls_certificate is None or tls_key is None:
        return grpc.ssl_channel_credentials(trusted)
    certificate, key = certificate_and_key(tls_certificate, tls_key)
    return grpc.ssl_channel_credentials(trusted, key, certificate)
