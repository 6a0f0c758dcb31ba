"""`draftwerk bench --target`: the figures of the same benchmark, and the same output as in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from draftwerk.cli.main import app


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["abc abc abc abc", "Hello there", "one two three", "aaaa", "the end"]
    lines = [{"category": f"kind {i % 2}", "turns": [text]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["bench", *arguments])


def report(prompts: Path, *arguments: str) -> dict[str, Any]:
    result = run("--prompts", str(prompts), "-n", "20", "--json", "-", *arguments)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize(
    "arguments", ["-c 1", "-c 4 --temperature 1 --top-k 20 --top-p 0.9 --seed 7 --ignore-eos", "-c 9 --chat"]
)
def test_the_output_is_the_same_as_in_process(server, tiny_model_path: Path, prompts: Path, arguments: str) -> None:
    here = report(prompts, *arguments.split(), "--model", str(tiny_model_path), "--kv-memory", "64MiB", "-t", "1")
    there = report(prompts, *arguments.split(), "--target", server.address)
    assert there["output_sha256"] == here["output_sha256"]
    assert (there["tokens"], there["prompt_tokens"]) == (here["tokens"], here["prompt_tokens"])
    assert set(there) == set(here)
    assert set(there["per_category"]) == {"kind 0", "kind 1"}


def test_what_it_says_about_the_server(server, tiny_model_path: Path, prompts: Path) -> None:
    values = report(prompts, "--target", server.address)
    settings = values["settings"]
    assert settings["target"] == server.address
    assert settings["model"] == tiny_model_path.name
    assert settings["kv_memory_bytes"] == 64 << 20
    assert values["engine"]["generated_tokens"] >= values["tokens"]
    assert values["peak_rss_mb"] == pytest.approx(values["engine"]["peak_resident_bytes"] / 2**20)
    assert values["aggregate_tokens_per_second"] > 0
    assert values["time_to_first_token_ms"]["p50"] > 0
    table = run("--prompts", str(prompts), "-n", "4", "--target", server.address).stdout
    assert f"at {server.address}" in " ".join(table.split())


def test_a_refused_parameter_and_an_absent_server_are_one_line(server, prompts: Path) -> None:
    refused = run("--prompts", str(prompts), "--target", server.address, "--top-p", "7")
    assert refused.exit_code == 2
    assert "top_p" in refused.stderr
    absent = run("--prompts", str(prompts), "--target", "127.0.0.1:1")
    assert absent.exit_code == 1
    assert "127.0.0.1:1" in absent.stderr
    assert refused.stderr.count("\n") == absent.stderr.count("\n") == 1
