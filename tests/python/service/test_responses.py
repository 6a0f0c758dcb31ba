"""From the engine's chunks and statistics to messages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from draftwerk import Chunk, Engine, GenerationStats, TokenLogprobs
from draftwerk.server.responses import generate_response, generation_statistics, joined_stats, spelling
from draftwerk_client.v1 import output_pb2, parameters_pb2, statistics_pb2

CHUNK = Chunk(text="ab", token_ids=(101, 102, 103), drafted=(True, True, False), position=7, received_at=1.0)
STATS = GenerationStats(
    prompt_tokens=10,
    cached_tokens=4,
    generated_tokens=6,
    steps=3,
    drafted=5,
    accepted=3,
    drafted_by_position=(3, 2),
    accepted_by_position=(2, 1),
    queue_time=0.25,
    time_to_first_token=1.5,
    decode_time=2.000000001,
    extra={"preemptions": 2},
)


def test_a_step() -> None:
    assert generate_response(CHUNK, 2**64 - 1) == output_pb2.GenerateResponse(
        text="ab", token_ids=[101, 102, 103], drafted_tokens=2, position=7, fingerprint=2**64 - 1
    )


def test_log_probabilities_and_bytes(engine: Engine) -> None:
    chunk = replace(
        CHUNK, token_ids=(101, 1), logprobs=(TokenLogprobs(-0.5, ((101, -0.5), (7, -1.0))), TokenLogprobs(-2.0))
    )
    wanted = parameters_pb2.OutputOptions(token_bytes=True)
    response = generate_response(chunk, 1, spelling(wanted, engine))
    assert list(response.token_bytes) == [b"a", b""]
    wanted.special_tokens = True
    assert list(generate_response(chunk, 1, spelling(wanted, engine)).token_bytes) == [b"a", b"<control 1>"]
    assert spelling(parameters_pb2.OutputOptions(special_tokens=True), engine) is None
    assert [entry.logprob for entry in response.logprobs] == [-0.5, -2.0]
    assert [[(top.token_id, top.logprob) for top in entry.top] for entry in response.logprobs] == [
        [(101, -0.5), (7, -1.0)],
        [],
    ]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", output_pb2.FINISH_REASON_STOP),
        ("length", output_pb2.FINISH_REASON_LENGTH),
        ("cancelled", output_pb2.FINISH_REASON_CANCELLED),
    ],
)
def test_the_last_step(reason: str, expected: int) -> None:
    response = generate_response(replace(CHUNK, finish_reason=reason, stats=STATS), 1)  # type: ignore[arg-type]
    assert response.finish_reason == expected
    assert response.statistics.generated_tokens == 6


def test_statistics() -> None:
    statistics = generation_statistics(STATS)
    assert (statistics.prompt_tokens, statistics.cached_tokens, statistics.generated_tokens) == (10, 4, 6)
    assert (statistics.steps, statistics.preemptions) == (3, 2)
    assert statistics.drafts == statistics_pb2.DraftStatistics(
        drafted=5, accepted=3, drafted_by_position=[3, 2], accepted_by_position=[2, 1]
    )
    assert statistics.queue_time.ToNanoseconds() == 250_000_000
    assert statistics.time_to_first_token.ToNanoseconds() == 1_500_000_000
    assert (statistics.decode_time.seconds, statistics.decode_time.nanos) == (2, 1)


def test_times_are_absent_where_there_was_no_token() -> None:
    statistics = generation_statistics(GenerationStats(prompt_tokens=3))
    assert statistics.HasField("queue_time")
    assert not statistics.HasField("time_to_first_token")
    assert not statistics.HasField("decode_time")


def test_statistics_of_one_part_are_its_own() -> None:
    joined = joined_stats([(100.0, STATS)])
    assert replace(joined, decode_time=STATS.decode_time) == STATS
    assert joined.decode_time == pytest.approx(STATS.decode_time)


def test_statistics_of_several_parts() -> None:
    without_tokens = GenerationStats(prompt_tokens=10, cached_tokens=9, queue_time=0.5)
    later = replace(STATS, prompt_tokens=18, cached_tokens=17, drafted_by_position=(1, 1, 1), queue_time=9.0)
    joined = joined_stats([(100.0, without_tokens), (101.0, STATS), (105.0, later), (110.0, without_tokens)])
    assert (joined.prompt_tokens, joined.cached_tokens, joined.queue_time) == (10, 9, 0.5)
    assert (joined.generated_tokens, joined.steps, joined.drafted, joined.accepted) == (12, 6, 10, 6)
    assert joined.drafted_by_position == (4, 3, 1)
    assert joined.accepted_by_position == (4, 2)
    assert joined.extra == {"preemptions": 4}
    assert joined.time_to_first_token == pytest.approx(1.0 + 1.5)  # since the first was submitted
    assert joined.decode_time == pytest.approx((105.0 + 1.5 + 2.0) - (101.0 + 1.5))


def test_no_part_has_a_token() -> None:
    joined = joined_stats([(1.0, GenerationStats()), (2.0, GenerationStats())])
    assert (joined.generated_tokens, joined.time_to_first_token, joined.decode_time) == (0, 0.0, 0.0)
