"""Clients that have no code of ours: definitions from server reflection, and stubs that protoc makes of the protos."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conformance.served import PROTOS, Served
from draftwerk import Engine, SamplingParams

CLIENT = Path(__file__).with_name("stock_client.py")
# What grpcio, grpcio-reflection and protobuf install, and what those import.
STOCK_PACKAGES = ("grpc", "grpc_reflection", "google.protobuf", "google._upb", "typing_extensions")
SERVICES = [
    "draftwerk.v1.Generation",
    "draftwerk.v1.Models",
    "draftwerk.v1.Operations",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
]


@pytest.fixture(scope="module")
def stock_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stock packages and nothing else."""
    directory = tmp_path_factory.mktemp("stock")
    for name in STOCK_PACKAGES:
        spec = find_spec(name)
        if spec is None:
            pytest.skip(f"{name} is not installed")
        link = directory / name.replace(".", "/")
        link.parent.mkdir(exist_ok=True)
        if spec.submodule_search_locations:
            link.symlink_to(next(iter(spec.submodule_search_locations)))
        else:
            assert spec.origin is not None
            link.with_suffix(Path(spec.origin).suffix).symlink_to(spec.origin)
    return directory


@pytest.fixture(scope="module")
def proto_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stubs")
    sources = [str(path.relative_to(PROTOS)) for path in PROTOS.glob("draftwerk/v1/*.proto")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}", f"--python_out={directory}", *sources],
        check=True,
        timeout=60,
    )
    return directory


def run(way: str, address: str, *packages: Path) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-S", str(CLIENT), way, address],  # -S: without site-packages
        env={"PYTHONPATH": ":".join(map(str, packages)), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results: dict[str, Any] = json.loads(process.stdout)
    return results


@pytest.fixture(scope="module", params=["reflection", "protos"])
def results(request: pytest.FixtureRequest, server: Served, stock_packages: Path) -> dict[str, Any]:
    packages = [stock_packages]
    if request.param == "protos":
        packages.append(request.getfixturevalue("proto_stubs"))
    return run(request.param, server.address, *packages) | {"way": request.param}


def test_none_of_our_code_is_there(results: dict[str, Any]) -> None:
    # The stubs that protoc makes are a package `draftwerk` of their own.
    assert results["importable"] == (["draftwerk"] if results["way"] == "protos" else [])


@pytest.mark.parametrize("results", ["reflection"], indirect=True)  # stubs of health are no part of our protos
def test_services_and_health(results: dict[str, Any]) -> None:
    assert [name for name in results["services"] if name != "grpc.reflection.v1.ServerReflection"] == SERVICES
    assert results["health"] == "SERVING"


def test_model(results: dict[str, Any], reference: Engine) -> None:
    model = results["model"]["model"]
    assert model["name"] == reference.info.model
    assert model["vocabulary_size"] == reference.info.vocab_size
    assert int(model["fingerprint"]) == reference.info.fingerprint


def test_tokens(results: dict[str, Any], reference: Engine) -> None:
    assert results["tokens"]["token_ids"] == reference.tokenize("hello world")
    assert results["text"] == "hello world"


def test_generate(results: dict[str, Any], reference: Engine) -> None:
    expected = reference.generate(
        "hello world", SamplingParams(temperature=1.0, seed=7, max_tokens=24, logprobs=2, drafting=False)
    )
    messages = results["generate"]["messages"]
    assert [i for message in messages for i in message.get("token_ids", [])] == list(expected.token_ids)
    assert "".join(message.get("text", "") for message in messages) == expected.text
    assert sum(len(message.get("logprobs", [])) for message in messages) == len(expected.token_ids)
    assert len({message["fingerprint"] for message in messages}) == 1
    assert messages[-1]["finish_reason"] in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")
    assert messages[0]["request_id"] == results["generate"]["request_id"]


def test_session(results: dict[str, Any], reference: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12)
    prompt = reference.tokenize("hello world")
    first = [*prompt, *reference.generate(prompt, params).token_ids]
    answer = list(reference.generate([*first, 20, 21], params).token_ids)
    session = results["session"]
    assert session["first"] == first
    assert session["fork_length"] == len(first)
    assert session["second"] == [20, 21, *answer]
    assert session["copy"] == answer


def test_failure_has_details(results: dict[str, Any]) -> None:
    failure = results["failure"]
    assert failure["code"] == "INVALID_ARGUMENT"
    assert [v["field"] for v in failure["details"]["BadRequest"]["field_violations"]] == ["sampling.top_p"]
    assert failure["details"]["RequestInfo"]["request_id"]


def test_stats(results: dict[str, Any]) -> None:
    assert int(results["stats"]["requests"]) >= 4
    assert int(results["stats"]["cache"]["used_bytes"]) >= 0
