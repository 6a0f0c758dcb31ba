"""`python -m draftwerk`: the `draftwerk` command."""

from draftwerk.cli.main import app

app(prog_name="draftwerk")
