"""Where a model computes: what is found, and what is said where there is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from draftwerk import Engine, SamplingParams, _core
from draftwerk.devices import LIBRARY_VARIABLE, DeviceError, find_gpu
from draftwerk.loading import TensorView, open_checkpoint
from draftwerk.weights import load_model
from tested_device import EMULATED
from tiny_checkpoint import save, tiny_model

emulated = pytest.mark.skipif(not EMULATED, reason="needs the emulated device (make test-cuda)")


def test_the_processor_is_always_there() -> None:
    assert find_gpu("cpu") is None


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=r"must be auto, cpu, cuda or cuda:N"):
        find_gpu(device)


def test_a_missing_backend_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr("draftwerk.devices._PACKAGE", "draftwerk_cuda_that_is_not_installed")
    assert find_gpu("auto") is None
    with pytest.raises(DeviceError, match=r"not installed: pip install \./cuda, from a checkout, or use --device cpu"):
        find_gpu("cuda")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert find_gpu("auto") is None
    with pytest.raises(DeviceError, match=r"no CUDA backend: .*none.so is missing; use --device cpu"):
        find_gpu("cuda")


def test_the_backend_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "some_cuda_package"
    package.mkdir()
    (package / "__init__.py").write_text("from pathlib import Path\nLIBRARY = Path(__file__).with_name('lib.so')\n")
    (package / "lib.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("draftwerk.devices._PACKAGE", "some_cuda_package")
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(DeviceError, match=r"the CUDA backend cannot be loaded: .*lib\.so"):
        find_gpu("cuda")


def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"no library")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(wrong))
    with pytest.raises(DeviceError, match=r"the CUDA backend cannot be loaded: .*wrong\.so"):
        find_gpu("cuda")


class FakeGpu:
    def __init__(self, number: int, refusal: str) -> None:
        self.number, self.name, self.refusal = number, f"fake {number}", refusal


def test_auto_takes_the_first_gpu_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = FakeGpu(0, "GPU 0 (fake 0) has compute capability 7.5, and 8.0 or more is needed; use --device cpu")
    new = FakeGpu(1, "")
    monkeypatch.setattr("draftwerk.devices._gpus", lambda: [old, new])
    assert find_gpu("auto") is new
    assert find_gpu("cuda:1") is new
    with pytest.raises(DeviceError, match=r"'cuda': GPU 0 \(fake 0\) has compute capability 7.5"):
        find_gpu("cuda")
    assert caplog.text == ""
    monkeypatch.setattr("draftwerk.devices._gpus", lambda: [old])
    assert find_gpu("auto") is None
    assert "computing on the processor: GPU 0 (fake 0) has compute capability 7.5" in caplog.text


def test_who_has_installed_the_backend_hears_why_auto_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr("draftwerk.devices._PACKAGE", "draftwerk_cuda_that_is_not_installed")
    assert find_gpu("auto") is None
    assert caplog.text == ""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert find_gpu("auto") is None
    assert "none.so is missing" in caplog.text


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens_per_layer.weight"])
def test_weights_that_are_too_large_for_a_gpu_are_told_before_they_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    checkpoint = open_checkpoint(save(tiny_model(), tmp_path))
    nothing = np.broadcast_to(np.zeros(1, np.uint8), (1 << 31,))  # no memory is behind it
    large = TensorView(name, "bf16", (1 << 20, 1 << 10), (nothing,))
    monkeypatch.setattr(type(checkpoint), "tensors", lambda _: [large])
    monkeypatch.setattr(_core.Model, "memory", (1_500_000_000, 2_000_000_000))
    message = r"the GPU has not enough memory: the weights take 2.1 GB, and 1.5 of its 2.0 GB are free; use narrower"
    with pytest.raises(MemoryError, match=message):
        load_model(checkpoint)


@emulated
def test_gpus_are_found_by_number() -> None:
    gpu = find_gpu("cuda")
    assert gpu is not None
    assert (gpu.number, gpu.name) == (0, "emulated")
    auto = find_gpu("auto")
    assert auto is not None
    with pytest.raises(DeviceError, match=r"'cuda:3': there is no such GPU; there is cuda:0 \(emulated\)"):
        find_gpu("cuda:3")


@emulated
def test_the_kv_cache_gets_what_is_left(tmp_path: Path) -> None:
    model = save(tiny_model(), tmp_path)
    with Engine(model, device="cuda", gpu_memory_fraction=0.5, drafter="none") as engine:
        assert engine.info.backend == "cuda sm_90, emulated"
        assert 300 << 20 < engine.info.kv_memory_bytes < 512 << 20  # of the 1 GiB that the emulated device has
        on_gpu = engine.generate([2, 5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(on_gpu.token_ids) == 4
    with pytest.raises(ValueError, match=r"gpu_memory_fraction = 1.5: must be more than 0 and at most 1"):
        Engine(model, device="cuda", gpu_memory_fraction=1.5)
    with pytest.raises(ValueError, match=r"gpu_memory_fraction = 0.001: with the weights loaded, .* leaves nothing"):
        Engine(model, device="cuda", gpu_memory_fraction=0.001)
    with pytest.raises(
        MemoryError, match=r"the GPU has not enough memory: 4.29 GB more are needed, and .* of its 1.07 GB"
    ):
        Engine(model, device="cuda", kv_memory="4GiB")


@emulated
def test_a_gpu_without_enough_memory_ends_a_command_in_one_line(tmp_path: Path) -> None:
    model = save(tiny_model(), tmp_path)
    command = [sys.executable, "-m", "draftwerk", "serve", "-m", str(model), "--device", "cuda"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([*command, "--kv-memory", "4GiB"], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the GPU has not enough memory: 4.29 GB more are needed")
