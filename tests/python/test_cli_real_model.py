"""The installed command on the real model, as a user runs it: output, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from draftwerk.loading import open_checkpoint, shipped_drafter

COMMAND = [sys.executable, "-m", "draftwerk.cli.main"]
PROMPT_IDS = "2,818,4083,529,506,13379,3958,12502"
# What llama.cpp and transformers give for it, greedily.
EXPECTED = (
    " with the invention of the steam engine in 1800. The first steam engine was a small, simple, and inexpensive "
    "device that could be used to drive a horse or a carriage. The"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=300)


def test_greedy_text_is_the_check_value(real_model: str) -> None:
    by_ids = run(
        *f"generate --model {real_model} --prompt-ids {PROMPT_IDS} --max-tokens 40 --temperature 0 --seed 1".split(),
        *"--ignore-eos --drafter lookup --json".split(),
    )
    assert by_ids.returncode == 0, by_ids.stderr
    assert json.loads(by_ids.stdout)["text"] == EXPECTED
    by_text = run(
        "generate", "--prompt", "The history of the steam engine begins", "-n", "40", "--drafter", "none", "--json"
    )
    assert json.loads(by_text.stdout)["token_ids"] == json.loads(by_ids.stdout)["token_ids"]


def test_a_drafter_is_evaluated_without_what_training_needs(real_model: str) -> None:
    missing = dict.fromkeys(("torch", "transformers", "safetensors", "gguf"))
    program = f"import sys; sys.modules |= {missing}; from draftwerk.cli.main import app; app(sys.argv[1:])"
    arguments = f"eval-drafter --model {real_model} --limit 2 --max-tokens 32 --timed 0 --json -".split()
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["prompts"] == 2
    assert figures["acceptance"][0]["whole"]["tokens_per_step"] > 1


def test_a_truncated_model_is_one_line_and_exit_2(real_model: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    with Path(open_checkpoint(real_model).path).open("rb") as whole:
        damaged.write_bytes(whole.read(20_000_000))
    result = run("generate", "--model", str(damaged), "--prompt", "a")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {damaged}: ")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_exits_with_130(real_model: str) -> None:
    arguments = "generate --prompt-ids 2,818 --max-tokens 30000 --ignore-eos --drafter none".split()
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)  # it generates
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "error: interrupted\n"


@pytest.mark.parametrize("concurrency", ["1", "3"])
def test_bench_hash_does_not_depend_on_drafting(real_model: str, tmp_path: Path, concurrency: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    turns = ["One two three one two three one two", "The capital of France", "a b c d e f g a b c d"]
    prompts.write_text("".join(json.dumps({"turns": [turn]}) + "\n" for turn in turns), encoding="utf-8")
    hashes = set()
    for drafter in ("none", "auto"):
        out = tmp_path / "report.json"
        result = run(
            *f"bench --drafter {drafter} --max-tokens 24 --temperature 1 --top-k 64 --seed 5".split(),
            *f"--concurrency {concurrency} --prompts {prompts} --json {out}".split(),
        )
        assert result.returncode == 0, result.stderr
        hashes.add(json.loads(out.read_text(encoding="utf-8"))["output_sha256"])
    assert len(hashes) == 1


OPENINGS = (
    "The history of the steam engine begins",
    "My grandmother used to bake bread every Sunday, and",
    "def read_lines(path):\n",
    "Dear Mr. Smith,\n\nThank you for",
    "The three most common causes of house fires are",
    "In 1969 the first people landed on",
    "Once upon a time there was a fox who",
    "To make a good vegetable soup, first",
)


def test_the_drafter_that_comes_along_is_small_has_its_terms_beside_it_and_drafts_well(
    real_model: str, tmp_path: Path
) -> None:
    drafter = shipped_drafter(real_model)
    assert drafter is not None
    assert drafter.stat().st_size <= 16 << 20
    assert "Gemma Terms of Use" in (drafter.parent / "NOTICE").read_text(encoding="utf-8")
    assert "Gemma Terms of Use" in (drafter.parent / "GEMMA_TERMS.txt").read_text(encoding="utf-8")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in OPENINGS), encoding="utf-8")
    result = run(
        *f"bench --model {real_model} --drafter {drafter} --no-lookup --draft-length 6 --max-tokens 32".split(),
        *f"--ignore-eos --concurrency 8 --prompts {prompts} --json -".split(),
    )
    assert result.returncode == 0, result.stderr
    # It is 2.2; of a drafter that was not trained it is 1.0, as without drafts.
    assert json.loads(result.stdout)["tokens_per_step"] >= 1.8


def test_the_demo_serves_streams_and_compares(real_model: str) -> None:
    result = run("demo", "--model", real_model, "-n", "24")
    assert result.returncode == 0, result.stderr
    assert "- On Wednesday the library opens at 9:00" in result.stdout
    assert "All 6 outputs are identical" in result.stdout
    assert "mtp+lookup" in result.stdout
