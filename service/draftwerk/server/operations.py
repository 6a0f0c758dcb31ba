"""The Operations service: how the server is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftwerk.memory import peak_resident_bytes, resident_bytes
from draftwerk.server.conversion import check_known_fields
from draftwerk.server.responses import duration
from draftwerk_client.v1 import operations_pb2 as pb
from draftwerk_client.v1 import operations_pb2_grpc
from draftwerk_client.v1.statistics_pb2 import DrafterStatistics, DraftStatistics

if TYPE_CHECKING:
    from draftwerk.engine import Engine
    from draftwerk.server.metrics import Metrics


class OperationsService(operations_pb2_grpc.OperationsServicer):
    """Answers from the engine's published statistics; never waits for a step."""

    def __init__(self, engine: Engine, metrics: Metrics, max_queued_tokens: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self._max_queued_tokens = max_queued_tokens

    async def GetStats(self, request: pb.GetStatsRequest, context: Any) -> pb.GetStatsResponse:  # noqa: N802 (gRPC's name)
        """Figures since the server started, and its state now."""
        check_known_fields(request)
        stats = self._engine.stats()
        return pb.GetStatsResponse(
            uptime=duration(self._metrics.uptime),
            max_queued_tokens=self._max_queued_tokens,
            sessions=self._metrics.sessions,
            cache=_cache(stats["kv"]),
            time=pb.EngineTime(**{phase: duration(seconds) for phase, seconds in stats["seconds"].items()}),
            resident_bytes=resident_bytes(),
            peak_resident_bytes=peak_resident_bytes(),
            drafts=_drafts(stats),
            drafters=[_drafter(name, figures) for name, figures in stats["drafters"].items()],
            **{name: stats[name] for name in _SAME_NAMES},
        )


_SAME_NAMES = (
    "requests",
    "finished",
    "running",
    "waiting",
    "paused",
    "queued_tokens",
    "steps",
    "rows",
    "prefill_rows",
    "generated_tokens",
    "preemptions",
)
_SAME_CACHE_NAMES = (
    "budget_bytes",
    "used_bytes",
    "peak_bytes",
    "sliding_pages",
    "full_pages",
    "prefix_lookup_tokens",
    "prefix_hit_tokens",
    "evicted_pages",
)


def _cache(kv: dict[str, Any]) -> pb.CacheStatistics:
    return pb.CacheStatistics(
        reclaimable_bytes=kv["cached_bytes"] + kv["parked_bytes"], **{name: kv[name] for name in _SAME_CACHE_NAMES}
    )


def _drafts(figures: dict[str, Any]) -> DraftStatistics:
    return DraftStatistics(
        drafted=figures["drafted"],
        accepted=figures["accepted"],
        drafted_by_position=figures["drafted_by_position"],
        accepted_by_position=figures["accepted_by_position"],
    )


def _recent(figures: dict[str, Any]) -> DraftStatistics:
    """Of the last rounds the engine keeps how far they went alone: see DrafterStatistics.recent."""
    drafted, accepted = figures["drafted_by_position"], figures["accepted_by_position"]
    return DraftStatistics(
        drafted=sum(drafted), accepted=sum(accepted), drafted_by_position=drafted, accepted_by_position=accepted
    )


def _drafter(name: str, figures: dict[str, Any]) -> DrafterStatistics:
    return DrafterStatistics(
        name=name,
        drafts=_drafts(figures),
        recent=_recent(figures["recent"]),
        recent_rounds=figures["recent"]["rounds"],
        warning="" if figures["warning"] is None else figures["warning"]["text"],
    )
