"""Records `draftwerk demo` as docs/images/demo.svg. On a quiet machine: .venv/bin/python docs/images/record_demo.py"""

from pathlib import Path

from rich.console import Console

from draftwerk.cli.demo import show

# As wide as the prompt's lines: a recording does not wrap them.
console = Console(record=True, width=114, force_terminal=True, color_system="truecolor")
show(console)
console.save_svg(str(Path(__file__).with_name("demo.svg")), title="draftwerk demo")
