"""Makes docs/api.md from the protos beside this file and their comments; api.md.jinja is its form and its introduction.

python proto/document.py           writes it
python proto/document.py --check   fails if it differs from what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
PAGE = PROTOS.parent / "docs" / "api.md"
PACKAGE = "draftwerk.v1"

# Where the source information keeps its comments: field numbers of descriptor.proto.
_SYNTAX = FileDescriptorProto.SYNTAX_FIELD_NUMBER
_SERVICE, _METHOD = FileDescriptorProto.SERVICE_FIELD_NUMBER, 2
_MESSAGE, _ENUM = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER
_FIELD, _NESTED = DescriptorProto.FIELD_FIELD_NUMBER, DescriptorProto.NESTED_TYPE_FIELD_NUMBER
_VALUE = EnumDescriptorProto.VALUE_FIELD_NUMBER

_WELL_KNOWN = "https://protobuf.dev/reference/protobuf/google.protobuf/#"
# Parts of a comment that are no prose: quoted values, code, names of the API or of gRPC.
_NAMES = re.compile(r'"[^"]*"|`[^`]*`|(?<![\w/-])[A-Za-z]\w*(?:\.[A-Za-z]\w*)*(?:\[\w+\])?')


@dataclass(frozen=True)
class Row:
    """A field of a message or a value of an enum."""

    number: int
    name: str
    type: str
    description: str


@dataclass(frozen=True)
class Type:
    """A message or an enum."""

    name: str
    is_enum: bool
    description: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Method:
    """A method of a service; its types are links."""

    name: str
    path: str
    request: str
    response: str
    description: str


@dataclass(frozen=True)
class Service:
    """A service."""

    name: str
    description: str
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Source:
    """One proto file."""

    title: str
    name: str
    description: str
    services: tuple[Service, ...]
    types: tuple[Type, ...]


def described_files() -> list[FileDescriptorProto]:
    """The protos with their comments: each file that has services, followed by the files that it needs."""
    with tempfile.TemporaryDirectory() as made:
        descriptors = Path(made) / "descriptors"
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={PROTOS}",
                f"--proto_path={files('grpc_tools') / '_proto'}",
                f"--descriptor_set_out={descriptors}",
                "--include_source_info",
                *sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto")),
            ]
        )
        if status != 0:
            sys.exit(f"protoc failed with status {status}")
        by_name = {file.name: file for file in FileDescriptorSet.FromString(descriptors.read_bytes()).file}
    order: list[str] = []
    for start in sorted(name for name, file in by_name.items() if file.service):
        reached = [start]
        for name in reached:  # grows meanwhile: the files nearest to the service come first
            reached += [needed for needed in by_name[name].dependency if needed in by_name and needed not in reached]
        order += [name for name in reached if name not in order]
    return [by_name[name] for name in order]


class Page:
    """Turns descriptors into what the template shows. Knows every name of the API, for links."""

    def __init__(self, described: Sequence[FileDescriptorProto]) -> None:
        self._described = described
        methods = [
            f"{service.name}.{method.name}"
            for file in described
            for service in file.service
            for method in service.method
        ]
        self._types = {
            name: type_ for file in described for name, type_, _ in _types_of(file.message_type, file.enum_type, [])
        }
        self._values = {
            value.name
            for type_ in self._types.values()
            if isinstance(type_, EnumDescriptorProto)
            for value in type_.value
        }
        self._fields = {
            field.name for type_ in self._types.values() if isinstance(type_, DescriptorProto) for field in type_.field
        }
        self._headings = {*self._types, *methods}
        anchors = [_anchor(heading) for heading in self._headings]
        clashes = {anchor for anchor in anchors if anchors.count(anchor) > 1}
        if clashes:
            sys.exit(f"headings of docs/api.md that cannot be told apart in links: {', '.join(sorted(clashes))}")

    def sources(self) -> list[Source]:
        """One for each proto."""
        return [self._source(file) for file in self._described]

    def _source(self, file: FileDescriptorProto) -> Source:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        services = tuple(
            Service(
                service.name,
                self._prose(comments, _SERVICE, index),
                tuple(
                    self._method(service.name, method, self._prose(comments, _SERVICE, index, _METHOD, at))
                    for at, method in enumerate(service.method)
                ),
            )
            for index, service in enumerate(file.service)
        )
        types = tuple(
            Type(
                name,
                isinstance(type_, EnumDescriptorProto),
                self._prose(comments, *path),
                tuple(self._rows(type_, path, comments)),
            )
            for name, type_, path in _types_of(file.message_type, file.enum_type, [])
        )
        name = file.name.rsplit("/", 1)[-1]
        title = f"Messages of {name}"
        return Source(title, file.name, self._prose(comments, _SYNTAX), services, types)

    def _method(self, service: str, method: MethodDescriptorProto, description: str) -> Method:
        request, response = self._link(method.input_type), self._link(method.output_type)
        return Method(
            f"{service}.{method.name}",
            f"/{PACKAGE}.{service}/{method.name}",
            f"stream {request}" if method.client_streaming else request,
            f"stream {response}" if method.server_streaming else response,
            description,
        )

    def _rows(
        self, type_: DescriptorProto | EnumDescriptorProto, path: list[int], comments: dict[tuple[int, ...], str]
    ) -> Iterator[Row]:
        if isinstance(type_, EnumDescriptorProto):
            for index, value in enumerate(type_.value):
                yield Row(value.number, value.name, "", self._cell(comments, *path, _VALUE, index))
            return
        for index, field in enumerate(type_.field):
            description = self._cell(comments, *path, _FIELD, index)
            if field.HasField("oneof_index") and not field.proto3_optional:
                description = f"*One of `{type_.oneof_decl[field.oneof_index].name}`.* {description}"
            yield Row(field.number, field.name, self._type_name(field, type_), description)

    def _type_name(self, field: FieldDescriptorProto, owner: DescriptorProto) -> str:
        entry = next((nested for nested in owner.nested_type if field.type_name.endswith(f".{nested.name}")), None)
        if entry is not None and entry.options.map_entry:
            key, value = (self._type_name(part, entry) for part in entry.field)
            return f"map&lt;{key}, {value}&gt;"
        name = self._link(field.type_name) if field.type_name else _scalar(field)
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {name}"
        return f"optional {name}" if field.proto3_optional else name

    def _link(self, full_name: str) -> str:
        """A link to a type, from its name as descriptors have it: ".draftwerk.v1.Prompt"."""
        name = full_name.removeprefix(".")
        if name.startswith("google.protobuf."):
            return f"[{name}]({_WELL_KNOWN}{name.rsplit('.', 1)[-1].lower()})"
        name = name.removeprefix(f"{PACKAGE}.")
        return f"[{name}](#{_anchor(name)})"

    def _prose(self, comments: dict[tuple[int, ...], str], *path: int) -> str:
        paragraphs = comments.get(tuple(path), "").strip().split("\n\n")
        return "\n\n".join(self._marked_up(" ".join(paragraph.split())) for paragraph in paragraphs)

    def _cell(self, comments: dict[tuple[int, ...], str], *path: int) -> str:
        return self._prose(comments, *path).replace("\n\n", "<br>").replace("|", "\\|")

    def _marked_up(self, text: str) -> str:
        """``text`` with links for types and methods, code for other names and values, and everything else escaped."""
        parts: list[str] = []
        end = 0
        for found in _NAMES.finditer(text):
            parts += [_escaped(text[end : found.start()]), self._name(found.group())]
            end = found.end()
        return "".join([*parts, _escaped(text[end:])])

    def _name(self, name: str) -> str:
        if name[0] in '"`':
            return f"`{name[1:-1]}`"
        head = name.rpartition(".")[0]
        is_word = name[1:].islower()  # "Model" and "open" may be meant as words
        if name in self._headings and not is_word:
            return f"[{name}](#{_anchor(name)})"
        if head in self._headings:
            return f"[{name}](#{_anchor(head)})"
        is_code = name in self._values or (name in self._fields and "_" in name)
        return f"`{name}`" if is_code else _escaped(name)


def _types_of(
    messages: Sequence[DescriptorProto], enums: Sequence[EnumDescriptorProto], path: list[int], prefix: str = ""
) -> Iterator[tuple[str, DescriptorProto | EnumDescriptorProto, list[int]]]:
    """Every message and enum by its name in the package, a message before those declared in it, with its path."""
    message_number = _NESTED if path else _MESSAGE
    for index, message in enumerate(messages):
        if not message.options.map_entry:
            here = [*path, message_number, index]
            yield prefix + message.name, message, here
            yield from _types_of(message.nested_type, message.enum_type, here, f"{prefix}{message.name}.")
    enum_number = DescriptorProto.ENUM_TYPE_FIELD_NUMBER if path else _ENUM
    for index, enum in enumerate(enums):
        yield prefix + enum.name, enum, [*path, enum_number, index]


def _scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _anchor(heading: str) -> str:
    """The fragment by which Markdown viewers find a heading."""
    return re.sub(r"[^\w-]", "", heading.lower())


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]<>*\\`])", r"\\\1", text)


def page() -> str:
    """The text of docs/api.md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROTOS),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("api.md.jinja").render(sources=Page(described_files()).sources(), anchor=_anchor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    check = parser.parse_args().check
    made = page()
    stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made
    if check:
        if stale:
            sys.exit("docs/api.md is not that of the protos; run: python proto/document.py")
        return
    if stale:
        PAGE.write_text(made, encoding="utf-8")
    print(f"docs/api.md {'changed' if stale else 'is up to date'}")


if __name__ == "__main__":
    main()
