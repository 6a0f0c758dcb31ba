"""Operations.GetStats."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from serve_process import InProcess

import draftwerk
from draftwerk_client.v1 import generation_pb2_grpc, operations_pb2_grpc, session_pb2
from draftwerk_client.v1 import operations_pb2 as pb


async def stats_of(address: str) -> pb.GetStatsResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        return await operations_pb2_grpc.OperationsStub(channel).GetStats(pb.GetStatsRequest(), timeout=30)


async def test_every_figure_is_the_engines(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, max_queued_tokens=12345) as server:
        stats = await stats_of(server.address)
    for name in ("requests", "finished", "running", "waiting", "paused", "queued_tokens", "steps", "rows",
                 "prefill_rows", "generated_tokens", "preemptions"):  # fmt: skip
        assert getattr(stats, name) == figures[name], name
    assert stats.max_queued_tokens == 12345
    assert (stats.drafts.drafted, stats.drafts.accepted) == (42, 21)
    assert list(stats.drafts.drafted_by_position) == [20, 10]
    assert list(stats.drafts.accepted_by_position) == [15, 6]
    mtp, lookup, idle = stats.drafters
    assert [drafter.name for drafter in stats.drafters] == ["mtp", "lookup", "idle"]
    assert (mtp.drafts.drafted, mtp.drafts.accepted) == (35, 15)
    assert list(mtp.drafts.drafted_by_position) == [15, 8]
    assert list(mtp.drafts.accepted_by_position) == [11, 4]
    assert (mtp.recent.drafted, mtp.recent.accepted, mtp.recent_rounds) == (15, 9, 10)
    assert list(mtp.recent.drafted_by_position) == [10, 5]
    assert list(mtp.recent.accepted_by_position) == [8, 1]
    assert (lookup.recent_rounds, idle.recent_rounds) == (5, 0)
    assert not any(drafter.warning for drafter in stats.drafters)
    for name in ("budget_bytes", "used_bytes", "peak_bytes", "sliding_pages", "full_pages", "prefix_lookup_tokens",
                 "prefix_hit_tokens", "evicted_pages"):  # fmt: skip
        assert getattr(stats.cache, name) == figures["kv"][name], name
    assert stats.cache.reclaimable_bytes == 350
    for phase, seconds in figures["seconds"].items():
        assert getattr(stats.time, phase).ToMilliseconds() == seconds * 1e3
    assert 1 << 20 < stats.resident_bytes <= stats.peak_resident_bytes
    assert stats.uptime.ToNanoseconds() > 0


async def test_no_field_is_forgotten(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine) as server:
        stats = await stats_of(server.address)
    assert {field.name for field, _ in stats.ListFields()} == {*pb.GetStatsResponse.DESCRIPTOR.fields_by_name} - {
        "sessions"
    }


async def test_open_sessions_are_counted(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        session = generation_pb2_grpc.GenerationStub(channel).Session()
        await session.write(session_pb2.SessionRequest(request_number=1, open=session_pb2.SessionRequest.Open()))
        assert (await session.read()).WhichOneof("event") == "opened"
        assert (await stats_of(server.address)).sessions == 1
        await session.done_writing()
        assert await session.read() is grpc.aio.EOF
        assert await session.code() == grpc.StatusCode.OK
        assert (await stats_of(server.address)).sessions == 0


async def test_a_port_of_its_own(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, operations_listen="127.0.0.1:0") as server:
        assert server.operations_address != server.address
        assert (await stats_of(server.operations_address)).steps == 40
        try:
            await stats_of(server.address)
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
            assert "/draftwerk.v1.Operations/GetStats on this port" in (error.details() or "")
        else:
            raise AssertionError("the main port answered")


async def test_fields_that_the_server_does_not_know_are_refused(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    request = pb.GetStatsRequest.FromString(b"\x08\x01")  # field 1
    async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="1 = set: must be absent") as caught:
            await operations_pb2_grpc.OperationsStub(channel).GetStats(request, timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
