"""What the tests of training share: they need torch and the native module, for its dequantisation."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftwerk.loading import Checkpoint
from fake_checkpoint import NATIVE_MODULE_BUILT, VOCABULARY

if not NATIVE_MODULE_BUILT:
    pytest.skip("the native module is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that chooses among many tokens."""
    import tiny_checkpoint  # here, as it needs torch

    model = tiny_checkpoint.tiny_model(vocab_size=VOCABULARY, logit_scale=0.5)
    return tiny_checkpoint.save(model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def target(model: Path) -> Checkpoint:
    """The same, opened, with a tokenizer."""
    from tiny_writer import with_tokenizer

    return with_tokenizer(model)
