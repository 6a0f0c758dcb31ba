"""Settings from flags, environment and file, and what is said of wrong ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from draftwerk.cli.main import app
from draftwerk.server.settings import Settings, SettingsError, resolve, unread_variables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_as_documented() -> None:
    settings = resolve({}, {}).settings
    assert settings.listen == "127.0.0.1:50051"
    assert settings.metrics_listen == "127.0.0.1:9464"
    assert (settings.max_unread_tokens, settings.max_message_bytes, settings.grace_period) == (256, 4 << 20, 30)
    assert settings.reflection
    assert settings.prefix_cache


def test_a_flag_goes_before_the_environment_that_before_the_file_that_before_the_default(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", "max_sequences = 1\nmax_context = 10\nthreads = 7\n")
    environment = {"DRAFTWERK_MAX_SEQUENCES": "2", "DRAFTWERK_MAX_CONTEXT": "20", "DRAFTWERK_CPU_ISA": "avx2"}
    resolved = resolve({"max_sequences": "3"}, environment, config)
    settings = resolved.settings
    assert (settings.max_sequences, settings.max_context, settings.threads, settings.max_step_rows) == (3, 20, 7, 512)
    assert resolved.origins == {
        "max_sequences": "--max-sequences",
        "max_context": "DRAFTWERK_MAX_CONTEXT",
        "threads": str(config),
    }


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", "threads = 7\n")
    other = write(tmp_path / "other.toml", "threads = 8\n")
    assert resolve({}, {"DRAFTWERK_CONFIG": str(config)}).settings.threads == 7
    assert resolve({}, {"DRAFTWERK_CONFIG": str(config)}, other).settings.threads == 8


VALUES: dict[str, Any] = {
    "model": "m",
    "drafter": "none",
    "lookup": False,
    "weights": "int8",
    "device": "cpu",
    "threads": 3,
    "listen": 'unix:/tmp/ü "x"\n.sock',
    "operations_listen": "[::1]:5",
    "metrics_listen": "",
    "max_message_bytes": 1 << 20,
    "reflection": False,
    "grace_period": 1.5,
    "step_timeout": 7.5,
    "tls_certificate": "a.pem",
    "tls_key": "b.pem",
    "tls_client_ca": "c.pem",
    "kv_memory": 1 << 29,
    "gpu_memory_fraction": 0.5,
    "max_context": 100,
    "max_sequences": 5,
    "max_calls": 10,
    "max_queued_tokens": 6,
    "max_unread_tokens": 7,
    "max_step_rows": 8,
    "prefill_chunk": 9,
    "prefix_cache": False,
    "draft_length": 0,
    "max_draft_length": 2,
    "log_format": "json",
    "log_level": "debug",
}


def test_every_setting_comes_from_every_source(tmp_path: Path) -> None:
    assert set(VALUES) == set(Settings.model_fields)
    expected = Settings.model_validate(VALUES)
    assert all(getattr(expected, name) != field.default for name, field in Settings.model_fields.items())
    from_flags = resolve(VALUES, {})
    from_environment = resolve({}, {f"DRAFTWERK_{name.upper()}": str(value) for name, value in VALUES.items()})
    from_file = resolve({}, {}, write(tmp_path / "c.toml", from_flags.as_toml()))
    assert from_flags.settings == from_environment.settings == from_file.settings == expected
    assert set(from_file.origins.values()) == {str(tmp_path / "c.toml")}


def test_variables_that_nothing_reads_are_found() -> None:
    read = {
        f"DRAFTWERK_{name.upper()}": "1" for name in (*VALUES, "config", "cpu_isa", "cuda_launches", "cuda_library")
    }
    of_kubernetes = {
        f"DRAFTWERK_{name}": "1"
        for name in (
            *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR"),
            *("GPU_SERVICE_HOST", "GPU_PORT_50051_TCP_PROTO"),
        )
    }
    assert unread_variables({**read, **of_kubernetes, "HOME": "/"}) == {}
    assert unread_variables({"DRAFTWERK_MAX_SEQUENCE": "3", "DRAFTWERK_ZZZ": "4", "draftwerk_model": "m"}) == {
        "DRAFTWERK_MAX_SEQUENCE": "DRAFTWERK_MAX_SEQUENCES",
        "DRAFTWERK_ZZZ": "",
    }


def test_every_variable_that_the_documentation_names_is_read() -> None:
    text = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bDRAFTWERK_[A-Z_]+", text))
    assert {"DRAFTWERK_LISTEN", "DRAFTWERK_CPU_ISA"} <= named
    assert unread_variables(dict.fromkeys(named, "")) == {}


def test_what_is_printed_is_toml_and_says_where_each_value_is_from() -> None:
    resolved = resolve({"threads": "3"}, {"DRAFTWERK_MODEL": "m"})
    text = resolved.as_toml()
    values = tomllib.loads(text)
    assert Settings.model_validate(values) == resolved.settings
    lines = text.splitlines()
    assert "threads = 3  # --threads" in lines
    assert 'model = "m"  # DRAFTWERK_MODEL' in lines
    assert "max_sequences = 64  # default" in lines
    assert "# kv_memory =  # not set" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_sequencs = 3", "c.toml: max_sequencs: there is no such setting; did you mean max_sequences?"),
        ("zzz = 3", "c.toml: zzz: there is no such setting; draftwerk serve --print-config shows all there are"),
        ("threads = -1", "c.toml: threads = -1: must be greater than or equal to 0"),
        ("threads = 'x'", "c.toml: threads = 'x': must be an integer"),
        ("threads = [1]", "c.toml: threads = [1]: must be an integer"),
        ("[threads]", "c.toml: threads = {}: must be an integer"),
        ("threads =", "c.toml: not a TOML file: "),
        (f"threads = {'[' * 100_000}", "c.toml: not a TOML file: nested too deeply"),
        ("listen = 'here'", "c.toml: listen = 'here': must be HOST:PORT, [IPV6]:PORT or unix:PATH"),
        ("kv_memory = '5 apples'", "c.toml: kv_memory = '5 apples': must be bytes, or a size such as 512MiB"),
        ("log_level = 'loud'", "c.toml: log_level = 'loud': must be 'debug', 'info', 'warning' or 'error'"),
        ("prefix_cache = 'perhaps'", "c.toml: prefix_cache = 'perhaps': must be a boolean"),
        ("tls_key = 'k'", "tls_certificate and tls_key: must be given together"),
    ],
)
def test_a_wrong_file_ends_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({}, {}, write(tmp_path / "c.toml", text))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: No such file"):
        resolve({}, {}, tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not a TOML file"):
        resolve({}, {}, tmp_path / "binary.toml")


def test_wrong_flags_and_variables_are_named_as_they_were_given() -> None:
    with pytest.raises(SettingsError, match=r"^--max-context = 'x': must be an integer$"):
        resolve({"max_context": "x"}, {})
    with pytest.raises(SettingsError, match=r"^DRAFTWERK_MAX_CONTEXT = '0': must be greater than or equal to 1$"):
        resolve({}, {"DRAFTWERK_MAX_CONTEXT": "0"})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *[(name, "9" * 11, "less than or equal to 2147483647") for name in
          ("max_sequences", "max_unread_tokens", "max_step_rows", "prefill_chunk")],
        *[(name, "9" * 20, "less than or equal to 9223372036854775807") for name in
          ("max_context", "max_queued_tokens")],
        ("threads", "9" * 11, "less than or equal to 511"),
        ("kv_memory", 10**20, "less than or equal to 9223372036854775807"),
        ("kv_memory", "99999999999GiB", "bytes, or a size such as 512MiB, and less than 8 EiB"),
        ("kv_memory", "9" * 400, "bytes, or a size such as 512MiB, and less than 8 EiB"),
    ],
)  # fmt: skip
def test_numbers_that_the_engine_cannot_hold(name: str, value: object, allowed: str) -> None:
    with pytest.raises(SettingsError, match=f"^--{name.replace('_', '-')} = {value!r}: must be {allowed}$"):
        resolve({name: value}, {})


@pytest.mark.parametrize("address", ["0.0.0.0:0", "localhost:65535", "[::]:1", "unix:/a/b", "unix:relative"])
def test_addresses(address: str) -> None:
    assert Settings(listen=address).listen == address


@pytest.mark.parametrize(
    "address", ["", ":1", "a", "a:", "a:b", "a:65536", "a:-1", "a:١", "::1:5", "unix:", "http://a:b"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(SettingsError, match=r"must be (HOST:PORT|a path)"):
        resolve({"listen": address}, {})


def test_metrics_are_not_on_unix_sockets() -> None:
    with pytest.raises(SettingsError, match="metrics are not served on unix sockets"):
        resolve({"metrics_listen": "unix:/x"}, {})


# --- the command -----------------------------------------------------------------------------------------------------


def serve(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(
        app, ["serve", *arguments], env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", **environment}
    )


def test_help_has_every_setting_with_its_description() -> None:
    shown = serve("--help").stdout
    words = " ".join(shown.replace("│", " ").split())
    for name, field in Settings.model_fields.items():
        assert "--" + name.replace("_", "-") in words
        assert str(field.description).split(".")[0].split()[0] in words
    assert "--no-prefix-cache" in words
    assert "4MiB" in words
    assert max(map(len, shown.splitlines())) <= 100


def test_print_config_shows_what_the_command_resolved(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", "max_context = 99\n")
    result = serve(
        "--config", str(config), "--no-prefix-cache", "-t", "2", "--print-config", DRAFTWERK_LOG_LEVEL="error"
    )
    assert result.exit_code == 0
    values = tomllib.loads(result.stdout)
    assert (values["max_context"], values["prefix_cache"], values["threads"]) == (99, False, 2)
    assert values["log_level"] == "error"
    assert f"max_context = 99  # {config}" in result.stdout


@pytest.mark.parametrize("arguments", ["--threads many", "--listen 50051", "--config nowhere.toml"])
def test_a_wrong_setting_is_a_usage_error_in_one_line(arguments: str) -> None:
    result = serve(*arguments.split())
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
