"""Everything that can be set about a server: by flag, environment variable or TOML file, checked in one place."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from draftwerk.memory import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "DRAFTWERK_"
CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"

# No settings: the name of the file, and what the choice of kernels, devices.py and the tests read.
_OTHER_VARIABLES = frozenset(
    ENVIRONMENT_PREFIX + name
    for name in (
        "CONFIG",
        *("CPU_ISA", "CUDA_LAUNCHES", "CUDA_LIBRARY"),
        *("PROMISE_CASES", "PROMISE_EXAMPLES", "PROMISE_TOKENS"),
    )
)
# What Kubernetes puts into every pod beside a Service that is called draftwerk, or draftwerk-something.
_OF_A_SERVICE = re.compile(r"_(SERVICE_(HOST|PORT)|PORT(_\d+_[A-Z]+)?)(_\w+)?")

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1  # what the engine counts in; it knows closer limits itself


class SettingsError(ValueError):
    """A setting that cannot be used. One line: where it was made, its name and value, and what is allowed."""


def _address(text: str) -> str:
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise ValueError("a path after unix:, such as unix:/run/draftwerk.sock")
        return text
    host, separator, port = text.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and int(port) < 1 << 16
    if not separator or not host or not is_port or (":" in host and not (host[0] == "[" and host[-1] == "]")):
        raise ValueError("HOST:PORT, [IPV6]:PORT or unix:PATH, such as 127.0.0.1:50051 or [::]:50051")
    return text


def _optional_address(text: str) -> str:
    return _address(text) if text else text


def _tcp_address(text: str) -> str:
    if text.startswith("unix:"):
        raise ValueError("HOST:PORT, such as 127.0.0.1:9464; metrics are not served on unix sockets")
    return _optional_address(text)


def _bytes(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError:
            raise ValueError("bytes, or a size such as 512MiB, and less than 8 EiB") from None
    return value


Address = Annotated[str, AfterValidator(_address)]
OptionalAddress = Annotated[str, AfterValidator(_optional_address)]
TcpAddress = Annotated[str, AfterValidator(_tcp_address)]
Size = Annotated[int, BeforeValidator(_bytes)]


def _setting(default: Any, group: str, metavar: str, description: str, **limits: Any) -> Any:
    extra: dict[str, Any] = {"group": group, "metavar": metavar}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Settings(BaseModel):
    """The settings of a server. Each is a flag, a key of the TOML file and an environment variable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = _setting(
        "gemma-3-270m", "Model", "M", "A Hugging Face directory, a GGUF file, a name on the hub, or a built-in name."
    )
    drafter: str = _setting(
        "auto", "Model", "D", "auto, lookup, none, or the path or hub name of an MTP drafter. Changes the speed alone."
    )
    lookup: bool = _setting(True, "Model", "", "Draft by lookup too, beside an MTP drafter.")
    weights: str = _setting(
        "auto", "Model", "TYPE", "auto, int8, int4, fp8, f32, f16 or bf16: the type to hold float weights in."
    )
    device: str = _setting(
        "auto",
        "Model",
        "DEVICE",
        "auto (a GPU if there is one), cpu, cuda or cuda:N.",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    threads: int = _setting(0, "Model", "N", "Kernel threads on the processor; 0 uses all cores.", ge=0, le=511)

    listen: Address = _setting("127.0.0.1:50051", "Network", "ADDRESS", "HOST:PORT or unix:PATH of the service.")
    operations_listen: OptionalAddress = _setting(
        "", "Network", "ADDRESS", "HOST:PORT or unix:PATH for the Operations service alone. Empty: as --listen."
    )
    metrics_listen: TcpAddress = _setting(
        "127.0.0.1:9464", "Network", "ADDRESS", "HOST:PORT for Prometheus metrics and /healthz over HTTP. Empty: none."
    )
    max_message_bytes: Size = _setting(4 << 20, "Network", "SIZE", "Largest request message.", ge=1 << 10, lt=1 << 31)
    reflection: bool = _setting(True, "Network", "", "Tell clients such as grpcurl what services there are.")
    grace_period: float = _setting(
        30.0, "Network", "SECONDS", "How long running streams may go on after SIGTERM.", ge=0, le=86_400
    )

    tls_certificate: Optional[Path] = _setting(
        None, "TLS", "FILE", "Certificate chain, PEM. With --tls-key: connections must use TLS."
    )
    tls_key: Optional[Path] = _setting(None, "TLS", "FILE", "Its private key, PEM, not encrypted.")
    tls_client_ca: Optional[Path] = _setting(
        None, "TLS", "FILE", "CA certificates, PEM: clients must have a certificate of one of these."
    )

    kv_memory: Optional[Size] = _setting(
        None,
        "Budgets",
        "SIZE",
        "Most memory of the KV cache, e.g. 512MiB. Default: 1GiB, or 25% of free memory if that is less.",
        gt=0,
        le=_INT64_MAX,
    )
    gpu_memory_fraction: float = _setting(
        0.9,
        "Budgets",
        "SHARE",
        "Share of a GPU's memory to use; without --kv-memory, the KV cache gets what is left.",
        gt=0,
        le=1,
    )
    max_context: Optional[int] = _setting(
        None,
        "Budgets",
        "N",
        "Longest sequence in tokens, prompt and output. Default: the model's.",
        ge=1,
        le=_INT64_MAX,
    )
    max_sequences: int = _setting(64, "Budgets", "N", "Generations that run at the same time.", ge=1, le=_INT32_MAX)
    max_calls: int = _setting(
        1024, "Budgets", "N", "Calls that are open at the same time, sessions among them.", ge=1, le=_INT32_MAX
    )
    max_queued_tokens: int = _setting(
        1 << 20,
        "Budgets",
        "N",
        "Prompt tokens that may wait; beyond that calls are refused at once.",
        ge=1,
        le=_INT64_MAX,
    )
    max_unread_tokens: int = _setting(
        256, "Budgets", "N", "Tokens that may wait for a slow reader before its generation pauses.", ge=1, le=_INT32_MAX
    )
    max_step_rows: int = _setting(
        512, "Budgets", "N", "Most tokens of one pass of the model: of prompts, last ones, drafts.", ge=1, le=_INT32_MAX
    )
    prefill_chunk: Optional[int] = _setting(
        None, "Budgets", "N", "Most prompt tokens of one pass. Default: --max-step-rows.", ge=1, le=_INT32_MAX
    )
    prefix_cache: bool = _setting(True, "Budgets", "", "Keep finished prompts for prompts that begin alike.")
    step_timeout: float = _setting(
        300.0,
        "Budgets",
        "SECONDS",
        "A step that takes longer hangs: health says NOT_SERVING. 0: none does.",
        ge=0,
        le=86_400,
    )
    draft_length: Optional[int] = _setting(
        None,
        "Budgets",
        "N",
        "Drafts per step, at most --max-draft-length. Default: decided by measured costs.",
        ge=0,
        le=64,
    )
    max_draft_length: int = _setting(16, "Budgets", "N", "Most drafts per step and generation, 0 to 64.", ge=0, le=64)

    log_format: Literal["auto", "console", "json"] = _setting(
        "auto", "Logs", "FORMAT", "console, json, or auto: console where stderr is a terminal."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Logs", "LEVEL", "debug, info, warning or error."
    )

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: must be given together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: must come with tls_certificate and tls_key")
        return self


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each value came from."""

    settings: Settings
    origins: Mapping[str, str]
    """Name to "--flag", "DRAFTWERK_NAME", the path of the file; absent: the default."""

    def as_toml(self) -> str:
        """The settings as a TOML file that gives the same, each with its origin as a comment."""
        lines = []
        group = ""
        for name, field in Settings.model_fields.items():
            extra = field.json_schema_extra
            assert isinstance(extra, dict)
            if extra["group"] != group:
                group = str(extra["group"])
                lines += ["", f"# {group}"]
            value = getattr(self.settings, name)
            origin = self.origins.get(name, "default")
            lines.append(f"# {name} =  # not set" if value is None else f"{name} = {_toml(value)}  # {origin}")
        return "\n".join(lines[1:]) + "\n"


def resolve(
    flags: Mapping[str, object], environment: Mapping[str, str] = os.environ, config: Path | None = None
) -> Resolved:
    """The settings from all sources: a flag goes before the environment, that before the file, that before the default.

    Args:
        flags: the flags that were given, by the names of the settings.
        environment: of these, DRAFTWERK_<NAME> and DRAFTWERK_CONFIG count.
        config: a TOML file; default: the one that DRAFTWERK_CONFIG names, if any.

    Raises:
        SettingsError: a value or a key is wrong, or the file cannot be read.
    """
    if config is None and environment.get(CONFIG_VARIABLE):
        config = Path(environment[CONFIG_VARIABLE])
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    if config is not None:
        values.update(_read(config))
        origins.update(dict.fromkeys(values, str(config)))
    for name in Settings.model_fields:
        variable = ENVIRONMENT_PREFIX + name.upper()
        if name in flags:
            values[name], origins[name] = flags[name], flag_of(name)
        elif variable in environment:
            values[name], origins[name] = environment[variable], variable
    try:
        return Resolved(Settings.model_validate(values), origins)
    except ValidationError as error:
        raise SettingsError(_explain(error, origins)) from None


def unread_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Names in the environment that look like a setting's and that nothing reads, each with the name that is nearest.

    The nearest is empty where none is near.
    """
    settings = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    unread: dict[str, str] = {}
    for variable in environment:
        if not variable.startswith(ENVIRONMENT_PREFIX) or _OF_A_SERVICE.search(variable):
            continue
        if variable not in settings and variable not in _OTHER_VARIABLES:
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            unread[variable] = ENVIRONMENT_PREFIX + near[0].upper() if near else ""
    return unread


def flag_of(name: str) -> str:
    """The flag of a setting: "--max-context"."""
    return "--" + name.replace("_", "-")


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a TOML file: {error}") from None
    except RecursionError:
        raise SettingsError(f"{path}: not a TOML file: nested too deeply") from None
    for name in values:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "draftwerk serve --print-config shows all there are"
            raise SettingsError(f"{path}: {name}: there is no such setting; {hint}")
    return values


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    allowed = str(first["ctx"]["error"]) if first["type"] == "value_error" else _allowed(first["msg"])
    if not first["loc"]:
        return allowed
    name = str(first["loc"][0])
    origin = origins[name]
    where = f"{origin} = " if origin.isupper() or origin.startswith("--") else f"{origin}: {name} = "
    return f"{where}{first['input']!r}: must be {allowed}"


def _allowed(message: str) -> str:
    """From "Input should be a valid integer, unable to parse string as an integer" to "an integer"."""
    reason = message.removeprefix("Input should be ").partition(", unable")[0]
    return reason.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
