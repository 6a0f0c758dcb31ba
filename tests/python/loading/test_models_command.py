"""`draftwerk models` on models and drafters: all fields in JSON, and in the table those that say something."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4
from typer.testing import CliRunner

from draftwerk.cli.main import app
from draftwerk.loading import BUILTIN_MODELS, builtin, open_assistant, open_checkpoint


def run(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["models", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def rows(table: str) -> dict[str, str]:
    lines = (line.strip("│┃ ").partition("│") for line in table.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines if value}


def test_json_has_every_field(tmp_path: Path) -> None:
    for path in (tiny4.write_target(tmp_path / "model"), tiny4.TinyGemma4Gguf().write(tmp_path / "model.gguf")):
        values = json.loads(run(str(path), "--json"))
        config = dataclasses.asdict(open_checkpoint(path).config)
        del config["layer_types"]
        assert {field: values[field] for field in config} == config
        assert (values["kind"], values["layers"], values["full_attention_layers"]) == ("model", 4, [1, 3])
    for path in (tiny4.write_assistant(tmp_path / "d"), tiny4.TinyAssistantGguf().write(tmp_path / "d.gguf")):
        values = json.loads(run(str(path), "--json"))
        config = dataclasses.asdict(open_assistant(path).config)
        text = config.pop("text")
        del text["layer_types"]
        assert {field: values[field] for field in text | config} == text | config
        assert (values["kind"], values["layers"], values["full_attention_layers"]) == ("MTP drafter", 2, [1])
        assert values["draft_length"] is None


def test_the_table_has_what_the_model_has(tmp_path: Path) -> None:
    found = rows(run(str(tiny4.write_target(tmp_path / "gemma4"))))
    assert found["num experts"] == str(tiny4.EXPERTS)
    assert found["attention k eq v"] == "yes"
    assert found["global head dim"] == str(tiny4.GLOBAL_HEAD_DIM)
    assert found["num global key value heads"] == str(tiny4.GLOBAL_KV_HEADS)
    assert found["num kv shared layers"] == str(tiny4.SHARED)
    assert found["hidden size per layer input"] == str(tiny4.PER_LAYER)
    assert found["rope partial rotary factor"] == "0.25"
    found = rows(run(str(tiny.write_directory(tmp_path / "gemma3"))))
    only_gemma4 = ("experts", "k eq v", "global", "shared", "per layer", "partial", "value norm", "scalars", "wide")
    assert not [name for name in found if any(part in name for part in only_gemma4)]
    assert found["head dim"] == str(tiny.HEAD_DIM)


def test_a_hostile_name_cannot_reach_the_terminal(tmp_path: Path) -> None:
    model = tiny.TinyGguf(**{"general.name": (tiny.STRING, "Tiny\x1b[2J")})
    assert "Tiny\\x1b[2J" in run(str(model.write(tmp_path / "tiny.gguf")))


def test_the_table_of_a_drafter(tmp_path: Path) -> None:
    path = tiny4.write_assistant(tmp_path / "gemma-assistant")
    found = rows(run(str(path)))
    assert found["kind"] == "MTP drafter"
    assert (found["backbone hidden size"], found["num centroids"]) == (str(tiny4.HIDDEN), str(tiny4.CENTROIDS))
    assert "draft length" not in found
    (path / "generation_config.json").write_text(json.dumps({"num_assistant_tokens": 6}))
    assert rows(run(str(path)))["draft length"] == "6"


def test_built_in_models_say_whether_they_have_a_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_SHIPPED", tmp_path)
    assert json.loads(run("--json"))[0]["drafter"] is None
    assert "included" not in run()
    file = tiny4.TinyReducedGguf().write(tmp_path / BUILTIN_MODELS["gemma-3-270m"].drafter)
    assert json.loads(run("--json"))[0]["drafter"] == str(file)
    assert "MTP, included" in run()


def test_the_table_of_a_reduced_head(tmp_path: Path) -> None:
    found = rows(run(str(tiny4.write_reduced(tmp_path / "drafter"))))
    assert found["draft vocab size"] == str(tiny4.DRAFT_VOCAB)
    assert "draft vocab size" not in rows(run(str(tiny4.write_assistant(tmp_path / "other"))))
