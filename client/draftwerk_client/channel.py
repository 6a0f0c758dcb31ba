"""Where the servers are and how to talk to them: addresses, balancing, health, retries, keepalive."""

from __future__ import annotations

import ipaddress
import json
import math
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from draftwerk_client.errors import CallContext, invalid

_KEEPALIVE_TIME_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_MAX_RETRIES = 4  # gRPC makes at most five attempts

# A request is kept for a retry as long as it is not larger than this: the longest that a server takes by default.
_RETRY_BUFFER_BYTES = 4 << 20

# A call of a server that is down fails at once; how soon its return is noticed is decided here.
_RECONNECT_BACKOFF_MS = {"initial": 200, "min": 2_000, "max": 5_000}

LONGEST_SECONDS = 1e8
"""The longest that anything is waited for, three years: where gRPC has to add a longer time to the clock, the sum
overflows, and the time has passed at once."""


@dataclass(frozen=True)
class Endpoint:
    """The servers of one client."""

    target: str
    """As gRPC writes it."""
    name: str
    """As the user wrote it, for messages."""
    options: tuple[tuple[str, Any], ...]
    """Of every channel to them."""
    credentials: grpc.ChannelCredentials | None
    timeout: float | None
    """Seconds; of calls that have none of their own."""
    retries: int
    """How many times a call is tried again."""

    @classmethod
    def of(
        cls,
        addresses: str | Sequence[str],
        *,
        timeout: float | None,
        credentials: grpc.ChannelCredentials | None,
        server_name: str | None,
        retries: int,
    ) -> Endpoint:
        """See Client for the arguments.

        Raises:
            ValueError: an address that is none, or a value out of range.
            OSError: one of several host names cannot be resolved.
        """
        if not 0 <= retries <= _MAX_RETRIES:
            raise ValueError(f"retries = {retries}: must be 0 to {_MAX_RETRIES}")
        timeout_of(timeout, None)
        names = [addresses] if isinstance(addresses, str) else list(addresses)
        if len(names) > 1 and credentials is not None and server_name is None:
            server_name = _split(names[0])[0]
        options: list[tuple[str, Any]] = [
            ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
            ("grpc.max_receive_message_length", -1),
            ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),  # an idle session sends no data for as long as it likes
            *((f"grpc.{name}_reconnect_backoff_ms", value) for name, value in _RECONNECT_BACKOFF_MS.items()),
        ]
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        return cls(target_of(names), ", ".join(names), tuple(options), credentials, timeout, retries)

    def open(self, *, healthy: bool = True) -> grpc.Channel:
        """A channel for synchronous calls. Connects when it is first used.

        Args:
            healthy: whether only servers that say that they serve get calls.
        """
        options = self._options(healthy)
        if self.credentials is None:
            return grpc.insecure_channel(self.target, options=options)
        return grpc.secure_channel(self.target, self.credentials, options=options)

    def open_async(self, *, healthy: bool = True) -> grpc.aio.Channel:
        """A channel for calls of the running event loop. Connects when it is first used. `healthy`: as for open()."""
        options = self._options(healthy)
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=options)
        return grpc.aio.secure_channel(self.target, self.credentials, options=options)

    def _options(self, healthy: bool) -> list[tuple[str, Any]]:
        return [*self.options, ("grpc.service_config", json.dumps(service_config(self.retries, healthy=healthy)))]

    def call(self, timeout: float | None, request_id: str | None = None) -> CallContext:
        """What a call is known by: its id, made up unless given, and its timeout, the client's unless given."""
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif not 1 <= len(request_id) <= 128 or not (request_id.isascii() and request_id.isprintable()):
            raise invalid("request_id", request_id, "1 to 128 printable ASCII characters")
        return CallContext(request_id, self.name, timeout_of(timeout, self.timeout))


def timeout_of(timeout: float | None, default: float | None) -> float | None:
    """Seconds that a call may take: those given, else the default. None: no limit.

    Raises:
        InvalidRequest: no time at all.
    """
    seconds = default if timeout is None else timeout
    if seconds is not None and not seconds > 0:
        raise invalid("timeout", seconds, "more than 0 seconds; math.inf for no limit")
    return None if seconds is None or seconds == math.inf else min(seconds, LONGEST_SECONDS)


def metadata_of(context: CallContext) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: the id under which the server logs it."""
    return (("x-request-id", context.request_id),)


def service_config(retries: int, *, healthy: bool = True) -> dict[str, Any]:
    """How gRPC treats calls: all servers in turn, with `healthy` only those that are, failures tried again.

    A server that refuses says in "grpc-retry-pushback-ms" how long to wait, which goes before the backoff given here.
    gRPC tries a call again only before its first message. Session is never tried again: its state would be lost.
    """
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if healthy:
        config["healthCheckConfig"] = {"serviceName": ""}
    if retries:
        config["methodConfig"] = [
            {
                "name": [
                    {"service": "draftwerk.v1.Generation", "method": "Generate"},
                    {"service": "draftwerk.v1.Models"},
                    {"service": "draftwerk.v1.Operations"},
                ],
                "retryPolicy": {
                    "maxAttempts": retries + 1,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
    return config


def target_of(addresses: Sequence[str]) -> str:
    """The target in gRPC's notation. Host names are resolved here if there are several addresses, else by gRPC.

    Raises:
        ValueError: an address that is none.
        OSError: one of several host names cannot be resolved.
    """
    if not addresses:
        raise ValueError("addresses is empty: give at least one HOST:PORT")
    if len(addresses) == 1:
        address = addresses[0]
        if address.startswith("unix:"):
            return address
        host, port = _split(address)
        return _numeric_target([(host, port)]) if _is_numeric(host) else f"dns:///{host}:{port}"
    resolved: list[tuple[str, int]] = []
    for address in addresses:
        if address.startswith("unix:"):
            raise ValueError(f"address {address!r}: a unix socket can only be the one address of a client")
        host, port = _split(address)
        if _is_numeric(host):
            resolved.append((host, port))
        else:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            resolved.extend((str(sockaddr[0]), port) for *_, sockaddr in found)
    return _numeric_target(list(dict.fromkeys(resolved)))


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r}: must be HOST:PORT, [IPV6]:PORT or unix:PATH, such as '127.0.0.1:50051'")
    return host, int(port)


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _numeric_target(addresses: list[tuple[str, int]]) -> str:
    if all(":" not in host for host, _ in addresses):
        return "ipv4:" + ",".join(f"{host}:{port}" for host, port in addresses)
    # One target has one family; IPv6 has a notation for the addresses of IPv4.
    mapped = [(host if ":" in host else f"::ffff:{host}", port) for host, port in addresses]
    return "ipv6:" + ",".join(f"[{host}]:{port}" for host, port in mapped)
