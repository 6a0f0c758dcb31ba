"""PEM files for TLS, checked before gRPC gets them: it would only say that there is no connection."""

from __future__ import annotations

import ssl
from pathlib import Path


class PemFileError(ValueError):
    """A file that cannot be used. One line: the flag it was given by, its path, and why."""


def certificate_and_key(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate chain and its private key, given by --tls-certificate and --tls-key.

    Raises:
        PemFileError: one of them cannot be read or used, or they do not belong together.
    """
    contents = _contents(certificate, "--tls-certificate"), _contents(key, "--tls-key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        reason = "the key does not belong to the certificate" if "MISMATCH" in str(error) else "not PEM, or damaged"
        raise PemFileError(f"--tls-certificate {certificate}, --tls-key {key}: {reason}") from None
    except ValueError:
        raise PemFileError(f"--tls-key {key}: is encrypted; give it without a passphrase") from None
    return contents


def authorities(path: Path, flag: str) -> bytes:
    """Certificates of authorities, given by this flag.

    Raises:
        PemFileError: the file cannot be read, or has none.
    """
    contents = _contents(path, flag)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise PemFileError(f"{flag} {path}: no PEM certificates in it") from None
    return contents


def _contents(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PemFileError(f"{flag} {path}: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError
