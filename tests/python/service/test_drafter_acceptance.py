"""A drafter that does not belong to its model: the engine, the server and the benchmark say so."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import RunningServer, end, run_command, scraped, start_serve

import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.acceptance import LEAST_REQUESTS
from draftwerk_client import Client

# With a fixed number of drafts the outcome does not depend on what steps take; with none, the draft budget decides.
DRAFT_LENGTH = 2
GREEDY = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma 4 with tokenizer and chat template. "misfit" beside it has the shape of its drafter, no more."""
    directory = tmp_path_factory.mktemp("gemma4") / "tiny"
    target = tiny_gemma4.ple_shared(seed=3)
    tiny_gemma4.save(target, directory)
    tiny_gemma4.save(tiny_gemma4.assistant_for(target, centroids=32, seed=4), directory.with_name("misfit"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_path / name, directory)
    return directory


def misfit(model: Path) -> str:
    return str(model.with_name("misfit"))


def open_engine(model: Path, **options: Any) -> Engine:
    given = {"drafter": misfit(model), "draft_length": DRAFT_LENGTH, "threads": 1, "kv_memory": "32MiB"}
    return Engine(model, **{**given, **options})


def texts(count: int) -> list[str]:
    return [f"{number} {'abcdefghij'[number % 10]} the" for number in range(count)]


# --- in an engine ----------------------------------------------------------------------------------------------------


def test_an_engine_says_it_in_its_statistics_and_once_in_the_log(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_engine(model, weights="int8") as engine:
        for text in texts(LEAST_REQUESTS - 1):
            engine.generate(text, GREEDY)
            assert engine.stats()["drafters"]["mtp"]["warning"] is None
        for text in texts(3):
            engine.generate(text, GREEDY)
        figures = engine.stats()["drafters"]["mtp"]
        assert engine.stats()["drafters"]["lookup"]["warning"] is None
    warning = figures["warning"]
    assert warning["accepted_by_position"][0] < warning["rounds"] / 10
    assert (warning["drafter"], warning["draft_length"]) == ("mtp", DRAFT_LENGTH)
    # Prompts were text, the names do not match, and int8 was asked for.
    seen = [cause["name"] for cause in warning["causes"] if cause["seen"]]
    assert (seen[0], seen[-1]) == ("no_chat_template", "quantised_target")
    assert "it is called misfit, the model is called tiny" in warning["text"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [warning["text"]]
    assert json.dumps(warning)


def test_it_is_seen_when_requests_end(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwerk.acceptance._INTERVAL", 0.0)
    with open_engine(model) as engine:
        engine.generate(texts(LEAST_REQUESTS + 1), GREEDY)  # and nobody asks for statistics
    assert [record.name for record in caplog.records] == ["draftwerk.acceptance"]


def test_requests_that_are_not_drafted_for_do_not_count(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = SamplingParams(max_tokens=4, drafting=False)
    with open_engine(model) as engine:
        engine.generate(texts(2 * LEAST_REQUESTS), plain)
        engine.generate(texts(LEAST_REQUESTS - 1), GREEDY)
        assert engine.stats()["drafters"]["mtp"]["warning"] is None
        assert engine.stats()["drafters"]["mtp"]["recent"]["rounds"] > 100


def test_prompts_by_the_chat_template_are_no_cause(model: Path) -> None:
    with open_engine(model) as engine:
        engine.generate([[{"role": "user", "content": text}] for text in texts(LEAST_REQUESTS + 1)], GREEDY)
        warning = engine.stats()["drafters"]["mtp"]["warning"]
    assert "no_chat_template" not in [cause["name"] for cause in warning["causes"]]


def test_the_draft_budget_hardly_asks_it_and_it_is_found_out_all_the_same(model: Path) -> None:
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    with open_engine(model, draft_length=None, lookup=False) as engine:
        for batch in range(100):
            engine.generate([f"{batch} {text}" for text in texts(10)], long)
            stats = engine.stats()
            if (warning := stats["drafters"]["mtp"]["warning"]) is not None:
                break
    assert warning is not None
    assert stats["drafted"] < stats["generated_tokens"] / 4
    assert "the draft budget has all but stopped drafting" in warning["text"]


def test_the_recent_figures_are_the_cores(model: Path) -> None:
    with open_engine(model, lookup=False) as engine:
        engine.generate(texts(4), GREEDY)
        figures = engine.stats()["drafters"]["mtp"]
        assert figures["recent"] == {
            "rounds": figures["drafted_by_position"][0],
            "drafted_by_position": figures["drafted_by_position"],
            "accepted_by_position": figures["accepted_by_position"],
        }
        engine.generate(texts(40), GREEDY)
        figures = engine.stats()["drafters"]["mtp"]
        assert figures["drafted_by_position"][0] > 1024
        assert 512 <= figures["recent"]["rounds"] == figures["recent"]["drafted_by_position"][0] < 1024


# --- in a server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def misfit_server(model: Path) -> Iterator[RunningServer]:
    """A server of that model with that drafter."""
    process = start_serve(
        *("--model", str(model), "--drafter", misfit(model), "--draft-length", str(DRAFT_LENGTH)),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--kv-memory", "32MiB", "--threads", "1"),
    )
    yield RunningServer(process, process.wait_for("serving"))
    assert end(process) == 0, "".join(process.lines)


def test_a_server_says_it_in_statistics_metrics_and_log(misfit_server: RunningServer) -> None:
    with Client(misfit_server.address) as client:
        assert not any(drafter.warning for drafter in client.stats().drafters)
        for text in texts(2 * LEAST_REQUESTS):
            client.generate(text, max_tokens=60, ignore_eos=True)
        mtp, lookup = client.stats().drafters
    assert (mtp.name, lookup.name, lookup.warning) == ("mtp", "lookup", "")
    assert re.match(r"drafter mtp: (none|\d+) of its last \d+ first drafts were accepted", mtp.warning)
    assert mtp.recent_rounds == mtp.recent_drafted_by_position[0] > 0
    assert sum(mtp.drafted_by_position) < mtp.drafted  # trees, with several drafts for one position

    found = scraped(misfit_server.serving["metrics"])
    assert found["draftwerk_drafter_acceptance_near_zero", "mtp"] == 1
    assert found["draftwerk_drafter_acceptance_near_zero", "lookup"] == 0
    assert found["draftwerk_drafter_recent_acceptance", "mtp"] < 0.1
    assert found["draftwerk_verified_drafts_total",] == mtp.drafted + lookup.drafted
    drafted = [
        found["draftwerk_drafter_drafted_tokens_total", "mtp", str(position)] for position in range(DRAFT_LENGTH)
    ]
    assert drafted == list(mtp.drafted_by_position)

    entry = misfit_server.server.wait_for(mtp.warning)
    assert (entry["level"], entry["logger"], entry["drafter"]) == ("warning", "draftwerk.acceptance", "mtp")
    assert entry["likely_causes"][0] == "no_chat_template"
    assert sum("Likely causes" in line for line in misfit_server.server.lines) == 1


# --- in a benchmark --------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"turns": [text]}) for text in texts(2 * LEAST_REQUESTS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_benchmark_ends_with_it(where: str, model: Path, prompts: Path, request: pytest.FixtureRequest) -> None:
    if where == "here":
        options = ["--model", str(model), "--drafter", misfit(model), "--draft-length", str(DRAFT_LENGTH)]
        options += ["--kv-memory", "32MiB", "--threads", "1"]
    else:
        options = ["--target", request.getfixturevalue("misfit_server").address]
    report_path = prompts.with_name("report.json")
    common = ["--prompts", str(prompts), "-n", "60", "--ignore-eos", "--json", str(report_path)]
    result = run_command("bench", *common, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(report_path.read_text(encoding="utf-8"))
    mtp = report["drafters"]["mtp"]
    both = [
        sum(values) for values in zip(*(d["drafted_by_position"] for d in report["drafters"].values()), strict=True)
    ]
    assert 0 < sum(both) <= report["drafted"], "a tree has several drafts for one position"
    shares = [a / d for a, d in zip(mtp["accepted_by_position"], mtp["drafted_by_position"], strict=True)]
    assert mtp["acceptance_by_position"] == pytest.approx(shares)
    steps = mtp["drafted_by_position"][0]
    assert f"drafter mtp: drafted in {steps} steps, accepted by position {shares[0]:.0%} " in result.stdout
    assert "drafter lookup: " in result.stdout
    assert result.stderr.count("Likely causes") == 1
    assert f"warning: {mtp['warning']}\n" in result.stderr
