"""grpc.health.v1.Health/Check for the whole server, in the bytes of the wire: two messages need no stubs."""

from __future__ import annotations

import grpc

from draftwerk_client.errors import CallContext, Unavailable, says_not_serving

METHOD = "/grpc.health.v1.Health/Check"

REQUEST = b""
"""HealthCheckRequest{service: ""}: the whole server."""

SERVING = b"\x08\x01"
"""HealthCheckResponse{status: SERVING}: field 1, a varint, 1."""

PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""What a server that is not ready yet answers, or nobody in its place."""

INTERVAL = 0.05
"""Seconds between two questions to a server that is up and not ready yet."""


def not_ready(context: CallContext, failure: grpc.RpcError | None) -> Unavailable:
    """The error of a wait that was in vain, with what the last try failed with; None: it was answered."""
    reason = "" if failure is None else failure.details() or failure.code().name
    if failure is None or says_not_serving(reason):
        reason = "it says that it is not serving"
    message = f"no server was ready at {context.target} within {context.timeout:g} s: {reason}"
    return Unavailable(message, grpc.StatusCode.UNAVAILABLE)
