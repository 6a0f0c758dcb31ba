"""Where a model computes: what is found, and what is said where there is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftwerk import Engine, SamplingParams
from draftwerk.devices import LIBRARY_VARIABLE, DeviceError, find_gpu
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
    with pytest.raises(DeviceError, match=r"not installed: .*pip install 'draftwerk\[cuda\]', or use --device cpu"):
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
        RuntimeError, match=r"the GPU has not enough memory: 4.29 GB more are needed, and .* of its 1.07 GB"
    ):
        Engine(model, device="cuda", kv_memory="4GiB")
