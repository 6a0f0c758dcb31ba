"""`draftwerk serve`: the gRPC server."""

from __future__ import annotations

import inspect
import logging
import signal
from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from draftwerk.cli import options
from draftwerk.cli.failures import CommandError, reports_failures, usage_error
from draftwerk.server.settings import Settings, SettingsError, flag_of, resolve, unread_variables

_log = logging.getLogger(__name__)

EPILOG = """
Every option can also be set in a TOML file (key [bold]max_context[/]) and in the environment
([bold]DRAFTWERK_MAX_CONTEXT[/]). A flag goes before the environment, the environment before the file.

[bold]Examples[/]

  draftwerk serve --model gemma-3-270m --listen 127.0.0.1:50051

  draftwerk serve --config draftwerk.toml --print-config

  draftwerk serve --listen unix:/run/draftwerk.sock --metrics-listen ""
"""


@reports_failures
def _serve(config: Path | None, print_config: bool, **flags: object) -> None:
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        resolved = resolve(given, config=config)
    except SettingsError as error:
        raise usage_error(str(error)) from None
    if print_config:
        typer.echo(resolved.as_toml(), nl=False)
        return

    _run(resolved.settings)


def _run(settings: Settings) -> None:
    from draftwerk.server import logs, ports, server

    # Until the server takes over: the first process of a container would ignore it.
    signal.signal(signal.SIGTERM, server.exit_at_once)
    logs.configure(settings.log_format, settings.log_level)
    for name, nearest in unread_variables().items():
        hint = f"; did you mean {nearest}?" if nearest else ""
        _log.warning("nothing reads the environment variable %s%s", name, hint)
    try:
        ports.check(settings)
        with options.loading_progress(settings.model) as progress:
            engine = server.open_engine(settings, progress)
        with engine:
            server.run(settings, engine)
    except ports.StartError as error:
        raise CommandError(str(error)) from None


def _parameters() -> list[inspect.Parameter]:
    """An option for each field of Settings. None stands for "not given": other sources may have a value."""

    def parameter(name: str, kind: Any, *declarations: str, **attributes: Any) -> inspect.Parameter:
        annotation = Annotated[kind, typer.Option(*declarations, **attributes)]
        default = False if kind is bool else None
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    parameters = [
        parameter("config", Optional[Path], "--config", "-c", metavar="FILE", help="A TOML file with settings."),
        parameter("print_config", bool, "--print-config", help="Show the settings, where each is from, and exit."),
    ]
    for name, field in Settings.model_fields.items():
        extra = cast("dict[str, str]", field.json_schema_extra)
        is_switch = field.annotation is bool
        declaration = f"{flag_of(name)}/{flag_of('no_' + name)}" if is_switch else flag_of(name)
        short = {"model": ["-m"], "drafter": ["-d"], "threads": ["-t"], "listen": ["-l"]}.get(name, [])
        parameters.append(
            parameter(
                name,
                Optional[bool] if is_switch else Optional[str],
                declaration,
                *short,
                help=_help(field, extra["metavar"]),
                metavar=extra["metavar"] or None,
                rich_help_panel=extra["group"],
                show_default=False,
            )
        )
    return parameters


def _help(field: FieldInfo, metavar: str) -> str:
    description, default = escape(field.description or ""), field.default
    if default in (None, "") or field.annotation is bool:
        return description
    shown = f"{default >> 20}MiB" if metavar == "SIZE" else default
    return f"{description} [dim]\\[default: {shown}][/]"


def serve(**arguments: Any) -> None:
    """Serve a model over gRPC, until SIGTERM or Ctrl-C."""
    _serve(**arguments)


serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
