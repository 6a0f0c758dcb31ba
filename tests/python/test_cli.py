"""The command line over a scripted core: what lands on stdout, what on stderr, exit codes, and JSON by its names."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from draftwerk import CheckpointError, Completion, Engine, SamplingParams, __version__
from draftwerk.cli.main import app
from fake_core import Engine as ScriptedEngine


@pytest.fixture
def run(checkpoint: Any):
    def run_command(*arguments: str, stdin: str | None = None):
        return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(arguments), input=stdin)

    return run_command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"question_id": 1, "category": "writing", "turns": ["abc", "ignored"]},
        {"question_id": 2, "category": "[coding]", "turns": ["de"]},
        {"question_id": 3, "category": "writing", "turns": ["f"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "command",
    [(), ("generate",), ("chat",), ("serve",), ("bench",), ("bench", "rows"), ("models",), ("tokenize",), ("demo",)],
)
def test_help_has_examples(run, command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert "Usage" in result.stdout


def test_version(run) -> None:
    assert run("--version").stdout == f"draftwerk {__version__}\n"


def test_generate_prints_the_text_on_stdout_and_the_rest_on_stderr(run) -> None:
    result = run("generate", "-m", "fake", "--prompt", "abc", "--max-tokens", "5")
    assert (result.exit_code, result.stdout) == (0, "abc\n")
    assert "5 tokens in 3 steps (1.67 per step)" in result.stderr


def test_generate_json_is_one_object_and_nothing_else(run) -> None:
    command = "generate --model fake --prompt-ids 101,230,132 --max-tokens 4 --temperature 0.5 --seed 7 --ignore-eos"
    result = run(*command.split(), "--drafter", "lookup", "--json")
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert values["token_ids"] == [101, 230, 132, 101]
    assert values["text"] == bytes([97, 226, 128, 97]).decode(errors="replace")
    assert values["finish_reason"] == "length"
    assert values["prompt_token_ids"] == [101, 230, 132]
    assert values["drafted"] == [True, False, True, False]
    assert values["stats"]["generated_tokens"] == 4
    assert values["stats"]["tokens_per_step"] == 2.0
    sent = ScriptedEngine.instances[-1].requests[-1]
    assert (sent.temperature, sent.seed, sent.ignore_eos) == (0.5, 7, True)


def test_generate_reads_prompts_from_files_and_stdin(run, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("né", encoding="utf-8")
    assert run("generate", "--prompt-file", str(path), "-n", "4").stdout == "né\n"
    assert run("generate", "--prompt-file", "-", "-n", "3", stdin="xy").stdout == "xy\n"


def test_generate_stop_chat_and_logprobs(run) -> None:
    result = run("generate", "--chat", "--prompt", "hello", "--stop", "lo", "--logprobs", "1", "--json")
    values = json.loads(result.stdout)
    assert (values["text"], values["finish_reason"]) == ("<user>hel", "stop")
    assert values["logprobs"][0] == {"logprob": -0.5, "top": [{"id": values["token_ids"][0], "logprob": -0.5}]}


def test_generate_without_tokenizer_prints_ids(run, checkpoint: Any) -> None:
    checkpoint.tokenizer = None
    assert run("generate", "--prompt-ids", "101 102", "-n", "3").stdout == "101 102 101 \n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one of --prompt, --prompt-ids and --prompt-file"),
        (("--prompt", "a", "--prompt-ids", "1"), "exactly one of"),
        (("--prompt-ids", "1,x"), "not a list of integers"),
        (("--prompt-ids", "1", "--chat"), "--chat needs text"),
        (("--prompt-file", "/nowhere/at-all"), "No such file"),
        (("--prompt", "a", "--max-tokens", "0"), "max_tokens = 0: must be 1 or more"),
        (("--prompt", "a", "--drafter", "best"), "drafter = 'best': must be one of auto"),
        (("--prompt", "a", "--drafter", "./drafter.gguf"), "no such file or directory"),
        (("--prompt", "a", "--draft-length", "100"), "--draft-length"),
        (("--prompt", "a", "--kv-memory", "lots"), "'lots' is not a size"),
        (("--prompt", "a", "--kv-memory", "99999999999GiB"), "'99999999999GiB' is too large"),
        (("--prompt", "a", "--threads", "99999999999"), "--threads"),
        (("--prompt", "a", "--weights", "int3"), "must be one of auto, int8"),
        (("--prompt", "a", "--seed", "-1"), "seed = -1"),
        (("--prompt", "a", "--max-tokens", "many"), "--max-tokens"),
        (("--prompt", "a", "--no-such-option"), "no-such-option"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_is_wrong(run, arguments: tuple[str, ...], message: str) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unusable_model_file_is_one_line_and_exit_2(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise CheckpointError("/some/model[1].gguf", "offset 99 lies outside\nthe file", tensor="output.weight")

    for module in ("draftwerk.loading", "draftwerk.weights"):
        monkeypatch.setattr(f"{module}.open_checkpoint", damaged)
    commands = [("generate", "-m", "x", "--prompt", "a"), ("tokenize", "a"), ("models", "x"), ("bench", "rows")]
    for command in commands:
        result = run(*command)
        assert result.exit_code == 2, command
        assert result.stdout == ""
        assert result.stderr.startswith("error: /some/model[1].gguf: tensor output.weight: offset 99")
        assert result.stderr.count("\n") == 1


def test_a_failure_inside_the_engine_exits_with_1(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_core.Engine.default_failure", "out of pages")
    result = run("generate", "--prompt", "a", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: request 1 failed: out of pages\n"


def test_interrupting_exits_with_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("draftwerk.engine.Engine.stream", interrupt)
    result = run("generate", "--prompt", "a")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_tokenize(run) -> None:
    assert json.loads(run("tokenize", "né", "--json").stdout) == {"text": "né", "token_ids": [2, 114, 199, 173]}
    assert json.loads(run("tokenize", "n", "--no-bos", "--json").stdout)["token_ids"] == [114]
    assert run("tokenize", "--ids", "2,114,199,173").stdout == "né\n"
    table = run("tokenize", "né").stdout
    assert "4 tokens" in table
    assert '"n"' in table
    assert "\\xc3" in table
    assert '"["' in run("tokenize", "[/b]").stdout
    assert "control token" in table
    assert run("tokenize", "--ids", "5000").exit_code == 2
    assert run("tokenize").exit_code == 2


def test_models_lists_and_describes(run) -> None:
    assert "gemma-3-270m" in run("models").stdout
    assert "Gemma Terms of Use" in json.loads(run("models", "--json").stdout)[0]["license"]
    values = json.loads(run("models", "anything", "--json").stdout)
    assert (values["name"], values["layers"], values["full_attention_layers"]) == ("fake-model", 2, [1])
    assert "q8_0 x3" in run("models", "anything").stdout


def bench_report(run, tmp_path: Path, *arguments: str) -> dict:
    out = tmp_path / "report.json"
    result = run("bench", "--model", "fake", "--json", str(out), *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_bench_reports_its_figures_by_name(run, tmp_path: Path, prompts: Path) -> None:
    report = bench_report(run, tmp_path, "--prompts", str(prompts), "--max-tokens", "5", "--drafter", "auto")
    assert (report["tokens"], report["steps"], report["tokens_per_step"]) == (15, 9, pytest.approx(15 / 9))
    for name in ("aggregate_tokens_per_second", "decode_tokens_per_second", "prefill_tokens_per_second", "peak_rss_mb"):
        assert report[name] > 0, name
    for name in ("time_to_first_token_ms", "inter_token_latency_ms"):
        assert set(report[name]) == {"p50", "p90", "p99"}
        assert 0 <= report[name]["p50"] <= report[name]["p90"] <= report[name]["p99"]
    assert report["prefill_tokens_per_second"] == pytest.approx((4 + 3 + 2) / (3 * 0.010))
    assert {name: values["tokens"] for name, values in report["per_category"].items()} == {"[coding]": 5, "writing": 10}
    outputs = [[2, 101, 102, 103, 2], [2, 104, 105, 2, 104], [2, 106, 2, 106, 2]]
    data = b"".join(struct.pack("<I", token) for output in outputs for token in [*output, 0xFFFFFFFF])
    assert report["output_sha256"] == hashlib.sha256(data).hexdigest()


def test_bench_output_does_not_depend_on_concurrency(run, tmp_path: Path, prompts: Path) -> None:
    hashes = {
        bench_report(run, tmp_path, "--prompts", str(prompts), "--concurrency", concurrency)["output_sha256"]
        for concurrency in ("1", "2", "8")
    }
    assert len(hashes) == 1


def test_bench_options_reach_the_engine(run, tmp_path: Path, prompts: Path) -> None:
    options = "--limit 2 --max-tokens 3 --temperature 1 --top-k 64 --top-p 0.5 --seed 9 --ignore-eos --no-prefix-cache"
    more = "--drafter none --kv-memory 1MiB --threads 3"
    report = bench_report(run, tmp_path, "--prompts", str(prompts), *options.split(), *more.split())
    assert (report["tokens"], report["tokens_per_step"]) == (6, 1.5)
    scripted = ScriptedEngine.instances[-1]
    assert (scripted.options.drafters, scripted.options.kv_memory_bytes) == ([], 1 << 20)
    assert scripted.options.prefix_cache is False
    assert scripted.model.threads == 3
    warm_up, *sent = scripted.requests
    assert warm_up.salt != ""
    assert [(r.temperature, r.top_k, r.top_p, r.seed, r.ignore_eos) for r in sent] == [(1, 64, 0.5, 9, True)] * 2


def test_bench_prints_a_table(run, prompts: Path) -> None:
    result = run("bench", "--prompts", str(prompts), "--max-tokens", "5")
    assert "tokens/step" in result.stdout
    assert "[coding]" in result.stdout
    piped = run("bench", "--prompts", str(prompts), "--max-tokens", "5", "--json", "-")
    assert json.loads(piped.stdout)["tokens"] == 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ("not json\n", "prompts.jsonl:1: not a line like"),
        ('{"turns": ["a"]}\n{"turns": []}\n', "prompts.jsonl:2: not a line like"),
        ('["a"]\n', "prompts.jsonl:1"),
        (f"{'[' * 100_000}\n", "prompts.jsonl:1"),
    ],
)
def test_bench_refuses_other_files(run, prompts: Path, content: str, message: str) -> None:
    prompts.write_text(content, encoding="utf-8")
    result = run("bench", "--prompts", str(prompts))
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", "")


def test_bench_needs_prompts(run) -> None:
    assert run("bench").exit_code == 2
    assert run("bench", "--prompts", "/nowhere/at-all").exit_code == 2


def test_bench_rows(run, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    result = run("bench", "rows", "--model", "fake", "--json", str(out))
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == {
        str(rows): pytest.approx(10 + rows) for rows in range(1, 17)
    }
    assert "relative to 1 row" in result.stdout


@pytest.mark.parametrize("option", ["--model m", "--json f", "--prompts f", "-c 2", "--full-head"])
def test_bench_rows_takes_no_options_before_it(run, option: str) -> None:
    result = run("bench", *option.split(), "rows", "--model", "fake")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "and rows exclude each other" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench --model m", "--model and --target exclude each other"),
        ("bench --drafter none", "--drafter and --target exclude each other"),
        ("bench --draft-length 2", "--draft-length and --target exclude each other"),
        ("bench --weights int8", "--weights and --target exclude each other"),
        ("bench --threads 1", "--threads and --target exclude each other"),
        ("bench --kv-memory 1MiB", "--kv-memory and --target exclude each other"),
        ("bench --no-prefix-cache", "--no-prefix-cache and --target exclude each other"),
        ("chat --model m", "--model and --target exclude each other"),
        ("chat -t 1", "--threads and --target exclude each other"),
    ],
)
def test_a_running_server_has_its_own_options(run, arguments: str, message: str) -> None:
    result = run(*arguments.split(), "--target", "127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_imported_only_when_needed() -> None:
    """`draftwerk --help` and `draftwerk generate` do not wait for libraries that only other commands need."""
    heavy = ("draftwerk_client", "grpc", "google.protobuf", "prompt_toolkit", "pydantic", "structlog", "numpy")
    program = f"import sys, draftwerk.cli.main; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


class ClientOfEngine:
    """A client whose server is an engine of this process: as much of draftwerk_client.Client as the demo uses."""

    def __init__(self, address: str) -> None:
        self.engine = Engine(address)

    def __enter__(self) -> ClientOfEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def model(self) -> SimpleNamespace:
        return SimpleNamespace(name="fake-model", backend="fake backend", drafter="lookup")

    def generate(self, prompt: str, **options: Any) -> Completion:
        return self.engine.generate(prompt, SamplingParams(**options))

    def stream(self, prompt: str, *, token_bytes: bool, **options: Any) -> Iterator[SimpleNamespace]:
        assert token_bytes
        for chunk in self.engine.stream(prompt, SamplingParams(**options)):
            pieces = tuple(self.engine.token_bytes(chunk.token_ids))
            yield SimpleNamespace(text=chunk.text, drafted=chunk.drafted, token_bytes=pieces)


@pytest.fixture
def demo(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("draftwerk.cli.options.server", lambda model, **_: nullcontext(model))
    monkeypatch.setattr("draftwerk_client.Client", ClientOfEngine)
    return lambda *arguments: run("demo", *arguments)


def test_demo_shows_terms_colours_and_that_both_agree(demo) -> None:
    result = demo("--max-tokens", "8", "--prompt", "abcd")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.index("Gemma Terms of Use") < result.stdout.index("drafted and accepted")
    assert "abcdabcdab\n" in result.stdout  # the prompt, <bos>, and what the scripted core makes of it
    assert "with drafting" in result.stdout
    assert "All 6 outputs are identical" in result.stdout


def test_demo_fails_if_drafting_changed_the_text(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_core.repeat_prompt", lambda request, index: 101 + request.drafting)
    result = demo("--max-tokens", "8")
    assert result.exit_code == 1
    assert "differ" in result.stderr
