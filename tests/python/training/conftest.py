"""What the tests of training share: they need torch and the native module, for its dequantisation."""

from __future__ import annotations

import pytest

from fake_checkpoint import NATIVE_MODULE_BUILT

if not NATIVE_MODULE_BUILT:
    pytest.skip("the native module is not built", allow_module_level=True)
