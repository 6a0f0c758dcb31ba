"""What Prometheus scrapes."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from serve_process import TIMEOUT, InProcess, RunningServer, ServerFactory, scraped
from session_client import SessionClient, hold_after, ids_prompt, start_and_hold

import draftwerk
import fake_core
from draftwerk.results import Chunk, GenerationStats
from draftwerk.server import http_port
from draftwerk.server.metrics import Metrics
from draftwerk.server.server import Server
from draftwerk_client.v1 import generation_pb2_grpc, models_pb2_grpc
from draftwerk_client.v1.generation_pb2 import GenerateRequest
from draftwerk_client.v1.models_pb2 import GetModelRequest
from draftwerk_client.v1.parameters_pb2 import Prompt, StopConditions
from draftwerk_client.v1.session_pb2 import SessionRequest


@pytest.fixture
def metrics(engine: draftwerk.Engine, figures: dict[str, Any]) -> Metrics:
    return Metrics(engine)


@pytest.fixture
def scrape(metrics: Metrics) -> Iterator[Any]:
    """A function that scrapes these metrics."""
    server, thread = http_port.serve("127.0.0.1", 0, metrics.registry, why_not_serving=str)
    yield lambda: scraped(f"127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join(30)


def chunk(tokens: int, received_at: float) -> Chunk:
    return Chunk(text="", token_ids=(7,) * tokens, drafted=(False,) * tokens, position=0, received_at=received_at)


def test_the_first_token_counts_from_the_arrival(metrics: Metrics, scrape: Any) -> None:
    metrics.observe_chunk(100.0, None, chunk(1, 100.015))
    found = scrape()
    assert found["draftwerk_time_to_first_token_seconds_count",] == 1
    assert found["draftwerk_time_to_first_token_seconds_sum",] == pytest.approx(0.015)
    assert found["draftwerk_time_to_first_token_seconds_bucket", "0.01"] == 0
    assert found["draftwerk_time_to_first_token_seconds_bucket", "0.02"] == 1
    assert found["draftwerk_time_to_first_token_seconds_bucket", "+Inf"] == 1
    assert found["draftwerk_inter_token_latency_seconds_count",] == 0


def test_tokens_of_one_step_share_its_time(metrics: Metrics, scrape: Any) -> None:
    metrics.observe_chunk(100.0, 101.0, chunk(4, 101.1))
    found = scrape()
    assert found["draftwerk_inter_token_latency_seconds_count",] == 4
    assert found["draftwerk_inter_token_latency_seconds_sum",] == pytest.approx(0.1)
    assert found["draftwerk_inter_token_latency_seconds_bucket", "0.02"] == 0
    assert found["draftwerk_inter_token_latency_seconds_bucket", "0.03"] == 4
    assert found["draftwerk_tokens_per_step_bucket", "3.0"] == 0
    assert found["draftwerk_tokens_per_step_bucket", "4.0"] == 1
    assert found["draftwerk_tokens_per_step_sum",] == 4


def test_a_value_on_a_bound_is_in_its_bucket(metrics: Metrics, scrape: Any) -> None:
    metrics.observe_chunk(0.0, None, chunk(1, 0.5))
    assert scrape()["draftwerk_time_to_first_token_seconds_bucket", "0.5"] == 1


def test_a_chunk_without_tokens_is_no_step(metrics: Metrics, scrape: Any) -> None:
    metrics.observe_chunk(0.0, 1.0, chunk(0, 2.0))
    found = scrape()
    assert found["draftwerk_tokens_per_step_count",] == 0
    assert found["draftwerk_inter_token_latency_seconds_count",] == 0


def test_ends_are_counted_by_reason(metrics: Metrics, scrape: Any) -> None:
    metrics.observe_end(GenerationStats(queue_time=0.25), "length")
    metrics.observe_end(GenerationStats(), "length")
    metrics.observe_end(GenerationStats(), "cancelled")
    found = scrape()
    assert found["draftwerk_generations_finished_total", "length"] == 2
    assert found["draftwerk_generations_finished_total", "cancelled"] == 1
    assert found["draftwerk_queue_time_seconds_sum",] == pytest.approx(0.25)


def test_calls_and_sessions(metrics: Metrics, scrape: Any) -> None:
    metrics.call_started("Generation/Session")
    metrics.call_started("Generation/Session")
    metrics.call_started("Generation/Generate")
    metrics.call_ended("Generation/Session", "OK")
    metrics.call_ended("Generation/Generate", "RESOURCE_EXHAUSTED")
    found = scrape()
    assert metrics.sessions == found["draftwerk_sessions",] == 1
    assert found["draftwerk_calls_running", "Generation/Generate"] == 0
    assert found["draftwerk_calls_total", "RESOURCE_EXHAUSTED", "Generation/Generate"] == 1
    assert found["draftwerk_calls_total", "OK", "Generation/Session"] == 1


ENGINE_FIGURES = {
    ("draftwerk_generations_total",): 5,
    ("draftwerk_generations_running",): 2,
    ("draftwerk_generations_waiting",): 4,
    ("draftwerk_generations_paused",): 1,
    ("draftwerk_queued_tokens",): 600,
    ("draftwerk_steps_total",): 40,
    ("draftwerk_rows_total",): 900,
    ("draftwerk_prefill_rows_total",): 500,
    ("draftwerk_generated_tokens_total",): 77,
    ("draftwerk_preemptions_total",): 6,
    ("draftwerk_verified_drafts_total",): 42,
    ("draftwerk_drafted_tokens_total", "0"): 20,
    ("draftwerk_drafted_tokens_total", "1"): 10,
    ("draftwerk_accepted_tokens_total", "0"): 15,
    ("draftwerk_accepted_tokens_total", "1"): 6,
    ("draftwerk_drafter_drafted_tokens_total", "mtp", "0"): 15,
    ("draftwerk_drafter_drafted_tokens_total", "mtp", "1"): 8,
    ("draftwerk_drafter_accepted_tokens_total", "mtp", "0"): 11,
    ("draftwerk_drafter_accepted_tokens_total", "mtp", "1"): 4,
    ("draftwerk_drafter_drafted_tokens_total", "lookup", "1"): 2,
    ("draftwerk_drafter_recent_acceptance", "mtp"): 0.8,
    ("draftwerk_drafter_recent_acceptance", "lookup"): 0.8,
    ("draftwerk_drafter_acceptance_near_zero", "mtp"): 0,
    ("draftwerk_engine_seconds_total", "target"): 8.0,
    ("draftwerk_kv_budget_bytes",): 1000,
    ("draftwerk_kv_used_bytes",): 800,
    ("draftwerk_kv_cached_bytes",): 300,
    ("draftwerk_kv_parked_bytes",): 50,
    ("draftwerk_kv_pages", "sliding"): 11,
    ("draftwerk_kv_pages", "full"): 12,
    ("draftwerk_kv_evicted_pages_total",): 9,
    ("draftwerk_prefix_lookup_tokens_total",): 400,
    ("draftwerk_prefix_hit_tokens_total",): 250,
}


def test_the_engine_is_asked_at_each_scrape(scrape: Any, figures: dict[str, Any]) -> None:
    found = scrape()
    assert {name: found[name] for name in ENGINE_FIGURES} == ENGINE_FIGURES
    figures["running"] = 63
    assert scrape()["draftwerk_generations_running",] == 63


def test_a_drafter_that_has_not_drafted_has_no_acceptance(scrape: Any) -> None:
    found = scrape()
    assert ("draftwerk_drafter_recent_acceptance", "idle") not in found
    assert found["draftwerk_drafter_acceptance_near_zero", "idle"] == 0


def test_positions_far_back_in_a_draft_share_a_label(scrape: Any, figures: dict[str, Any]) -> None:
    figures["drafters"] = {"mtp": fake_core.drafter_figures([100] * 60, [50, *[1] * 59])}
    found = scrape()
    drafted = {name[2]: n for name, n in found.items() if name[0] == "draftwerk_drafter_drafted_tokens_total"}
    accepted = {name[2]: n for name, n in found.items() if name[0] == "draftwerk_drafter_accepted_tokens_total"}
    assert drafted == {**{str(position): 100 for position in range(8)}, "8+": 5200}
    assert accepted == {"0": 50, **{str(position): 1 for position in range(1, 8)}, "8+": 52}
    assert found["draftwerk_drafter_recent_acceptance", "mtp"] == 0.5


def test_what_is_served_and_its_memory(scrape: Any) -> None:
    found = scrape()
    (info,) = (name for name in found if name[0] == "draftwerk_info")
    assert set(info) == {"draftwerk_info", draftwerk.__version__, "fake-model", "fake backend", "lookup"}
    assert found["process_resident_memory_bytes",] > 1 << 20
    assert found["draftwerk_uptime_seconds",] > 0


def test_names_and_help_follow_the_conventions(metrics: Metrics) -> None:
    for family in metrics.collect():
        assert family.name.startswith("draftwerk")
        assert family.documentation.endswith(".")
        assert "_ms" not in family.name


def test_the_retry_delay_comes_from_the_queue_and_its_speed(
    metrics: Metrics, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = metrics._started_at
    monkeypatch.setattr("draftwerk.server.metrics.time.perf_counter", lambda: now)
    assert metrics.retry_delay() == 1.0  # nothing is known yet
    now += 2.0
    assert metrics.retry_delay() == pytest.approx(600 / 2 / 250)  # 500 tokens in 2 s
    figures["queued_tokens"] = 1 << 30
    assert metrics.retry_delay() == 10.0
    figures["queued_tokens"] = 1
    assert metrics.retry_delay() == 0.1
    now += 0.5
    figures["prefill_rows"] += 10**6  # too short a time to tell
    figures["queued_tokens"] = 600
    assert metrics.retry_delay() == pytest.approx(600 / 2 / 250)


def test_a_quiet_spell_does_not_make_the_retry_delay_longer(
    metrics: Metrics, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = metrics._started_at + 3600.0
    monkeypatch.setattr("draftwerk.server.metrics.time.perf_counter", lambda: now)
    assert metrics.retry_delay() == 1.0  # how fast it is while calls are refused is not known yet
    now += 1.0
    figures["prefill_rows"] += 300
    assert metrics.retry_delay() == pytest.approx(600 / 2 / 300)
    now += 3600.0
    figures["prefill_rows"] += 300
    assert metrics.retry_delay() == pytest.approx(600 / 2 / 300)
    now += 2.0
    figures["prefill_rows"] += 300
    assert metrics.retry_delay() == pytest.approx(600 / 2 / 150)


async def test_a_server_counts_what_it_does(server: RunningServer, channel: grpc.aio.Channel) -> None:
    def difference(name: str, *labels: str) -> float:
        return after.get((name, *labels), 0) - before.get((name, *labels), 0)

    before = await asyncio.to_thread(scraped, server.serving["metrics"])
    request = GenerateRequest(prompt=Prompt(text="hello"), stop=StopConditions(max_tokens=30, ignore_end_tokens=True))
    async for _ in generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=TIMEOUT):
        pass
    after = await asyncio.to_thread(scraped, server.serving["metrics"])
    assert difference("draftwerk_time_to_first_token_seconds_count") == 1
    assert difference("draftwerk_inter_token_latency_seconds_count") == 29
    assert difference("draftwerk_tokens_per_step_sum") == 30
    assert difference("draftwerk_generated_tokens_total") == 30
    assert difference("draftwerk_generations_total") == 1
    assert difference("draftwerk_generations_finished_total", "length") == 1
    assert difference("draftwerk_calls_total", "OK", "Generation/Generate") == 1
    assert after["draftwerk_kv_budget_bytes",] == 64 << 20
    assert after["draftwerk_generations_running",] == 0


@pytest.fixture
async def serving(engine: draftwerk.Engine, inprocess_server: InProcess) -> AsyncIterator[Server]:
    """A server of the scripted engine that is scraped."""
    async with inprocess_server(engine, metrics_listen="127.0.0.1:0") as server:
        yield server


async def finished(server: Server, reason: str, count: int) -> None:
    """Waits until so many generations have ended, and checks that it was for this reason."""
    ended: dict[str, float] = {}
    for _ in range(200):
        found = await asyncio.to_thread(scraped, server.metrics_address)
        ended = {name[1]: n for name, n in found.items() if name[0] == "draftwerk_generations_finished_total"}
        if sum(ended.values()) >= count:
            break
        await asyncio.sleep(0.01)
    assert ended == {reason: count}


async def test_a_stream_that_its_client_leaves_is_counted(
    serving: Server, scripted_channel: grpc.aio.Channel, scripted: fake_core.Engine, figures: dict[str, Any]
) -> None:
    hold_after(scripted, 2)
    stub = generation_pb2_grpc.GenerationStub(scripted_channel)
    left = stub.Generate(GenerateRequest(prompt=ids_prompt([10])))
    await left.read()
    left.cancel()
    await finished(serving, "cancelled", 1)
    scripted.gate.set()
    late = stub.Generate(GenerateRequest(prompt=ids_prompt([10])), timeout=2.0)
    await late.read()
    with pytest.raises(grpc.aio.AioRpcError):
        await late.read()
    await finished(serving, "cancelled", 2)


async def test_what_runs_when_its_session_ends_is_counted(
    serving: Server, session: SessionClient, scripted: fake_core.Engine, figures: dict[str, Any]
) -> None:
    await start_and_hold(session, scripted, after=2)
    session.call.cancel()
    await finished(serving, "cancelled", 1)


async def test_failures_are_counted(
    serving: Server, session: SessionClient, scripted_channel: grpc.aio.Channel, scripted: fake_core.Engine,
    figures: dict[str, Any],
) -> None:  # fmt: skip
    scripted.fail_with = "out of smoke"
    call = generation_pb2_grpc.GenerationStub(scripted_channel).Generate(GenerateRequest(prompt=ids_prompt([10])))
    with pytest.raises(grpc.aio.AioRpcError, match="out of smoke"):
        await call.read()
    await session.append(10)
    assert (await session.answer(generate=SessionRequest.Generate())).HasField("error")
    await finished(serving, "error", 2)


async def test_a_model_whose_name_is_no_text(
    server_process: ServerFactory, tiny_model_path: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_model_path, tmp_path / os.fsdecode(b"caf\xe9"))
    server = server_process("--model", str(path))
    async with grpc.aio.insecure_channel(server.address) as channel:
        model = (await models_pb2_grpc.ModelsStub(channel).GetModel(GetModelRequest(), timeout=TIMEOUT)).model
    assert model.name == r"caf\udce9"
    assert any(name[0] == "draftwerk_info" and model.name in name for name in scraped(server.serving["metrics"]))
