"""Makes the stubs under client/draftwerk_client/v1 from the protos beside this file.

python proto/generate.py           writes them
python proto/generate.py --check   fails if they differ from what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
STUBS = PROTOS.parent / "client" / "draftwerk_client" / "v1"
_BIN = Path(sys.executable).parent  # where mypy-protobuf, which is installed with this interpreter, has its plugins
_PACKAGE_NOTE = '"""Stubs of the package draftwerk.v1, made from the protos by proto/generate.py."""\n'


def generate() -> dict[str, str]:
    """The text of each stub by its file name."""
    with tempfile.TemporaryDirectory() as made:
        sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "draftwerk" / "v1").glob("*.proto"))
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={PROTOS}",
                f"--proto_path={files('grpc_tools') / '_proto'}",
                f"--python_out={made}",
                f"--grpc_python_out={made}",
                f"--mypy_out=quiet:{made}",
                f"--mypy_grpc_out=quiet:{made}",
                *(f"--plugin={plugin}={_BIN / plugin}" for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
                *sources,
            ]
        )
        if status != 0:
            sys.exit(f"protoc failed with status {status}")
        texts = {path.name: path.read_text(encoding="utf-8") for path in (Path(made) / "draftwerk" / "v1").iterdir()}
        # A proto that defines no service gets a service stub all the same, with nothing in it.
        empty = {name for name, text in texts.items() if name.endswith("_pb2_grpc.py") and "Servicer" not in text}
        stubs = {name: _in_client_package(text) for name, text in texts.items() if name.removesuffix("i") not in empty}
        return {"__init__.py": _PACKAGE_NOTE, **stubs}


def _in_client_package(stub: str) -> str:
    # protoc derives the module of an import from the path of the proto. The stubs live in the client's package, because
    # `draftwerk` is the server's.
    stub = re.sub(r"^from draftwerk\.v1 import", "from draftwerk_client.v1 import", stub, flags=re.MULTILINE)
    return re.sub(r"\bdraftwerk\.v1\.(\w+_pb2)\b", r"draftwerk_client.v1.\1", stub)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the stubs are not up to date")
    check = parser.parse_args().check
    stubs = generate()
    present = {path.name: path.read_text(encoding="utf-8") for path in STUBS.glob("*.py*")} if STUBS.is_dir() else {}
    stale = sorted(name for name in stubs.keys() | present.keys() if stubs.get(name) != present.get(name))
    if check:
        if stale:
            sys.exit(f"stubs are not those of the protos: {', '.join(stale)}; run: python proto/generate.py")
        return
    STUBS.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in stubs:
            (STUBS / name).write_text(stubs[name], encoding="utf-8")
        else:
            (STUBS / name).unlink()
    print(f"{len(stubs)} stubs, {len(stale)} changed")


if __name__ == "__main__":
    main()
