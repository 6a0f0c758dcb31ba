"""FP8 checkpoints in the form of compressed-tensors: what a ``quantization_config`` must say to be read.

Such a checkpoint holds matrices as e4m3, and beside each, as ``NAME_scale``, what its rows are multiplied by: a scale
for each of them (strategy ``channel``) or one for all (``tensor``). Which matrices these are, their own types say; the
lists of targets and of what is ignored are not looked at. How activations are to be quantised is not looked at either:
they are not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from draftwerk.loading.errors import CheckpointError, printable

_logger = logging.getLogger(__name__)
_FIELD = "quantization_config"
_FORMATS = ("float-quantized",)
# Field to the values that are read; None: it may be left out, which means the first one.
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("channel", "tensor"),
    "symmetric": (True, None),
    "dynamic": (False, None),
}
# Each of these changes what the weights or the keys and values are, unless it is empty.
_OTHER_SCHEMES = ("kv_cache_scheme", "transform_config", "sparsity_config")
_NOTHING_SPARSE = "dense"  # a format


def holds_fp8(path: str, config: Mapping[str, Any]) -> bool:
    """Whether matrices may be FP8, by a parsed ``config.json``; ``path`` names that file in errors.

    Raises:
        CheckpointError: weights are quantised in a way that is not supported.
    """
    text = config.get("text_config")
    places = [(_FIELD, config.get(_FIELD))]
    if isinstance(text, Mapping):
        places.append((f"text_config.{_FIELD}", text.get(_FIELD)))
    given = [(where, value) for where, value in places if value is not None]
    for where, value in given:
        _check(path, where, _object(path, where, value))
    return bool(given)


def _check(path: str, where: str, config: Mapping[str, Any]) -> None:
    _one_of(path, where, config, "quant_method", ("compressed-tensors",))
    _one_of(path, where, config, "format", _FORMATS)
    for field in _OTHER_SCHEMES:
        scheme = config.get(field)
        if scheme and not (isinstance(scheme, Mapping) and scheme.get("format") == _NOTHING_SPARSE):
            raise CheckpointError(path, f"field {where}.{field} is not supported: {printable(repr(scheme))}")
    groups = _object(path, f"{where}.config_groups", config.get("config_groups"))
    if not groups:
        raise CheckpointError(path, f"field {where}.config_groups is empty")
    quantises_activations = False
    for name, value in groups.items():
        of_group = f"{where}.config_groups.{printable(name)}"
        group = _object(path, of_group, value)
        _one_of(path, of_group, group, "format", (*_FORMATS, None))
        weights = _object(path, f"{of_group}.weights", group.get("weights"))
        for field, values in _WEIGHTS.items():
            _one_of(path, f"{of_group}.weights", weights, field, values)
        quantises_activations |= group.get("input_activations") is not None
    if quantises_activations:
        _logger.info("%s asks for quantised activations: they are not quantised, which is more exact", path)


def _object(path: str, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(path, f"field {where} is {'missing' if value is None else 'not an object'}")
    return value


def _one_of(path: str, where: str, fields: Mapping[str, Any], field: str, values: tuple[Any, ...]) -> None:
    value = fields.get(field)
    if value not in values:
        supported = ", ".join(str(value) for value in values if value is not None)
        raise CheckpointError(
            path, f"field {where}.{field} = {printable(repr(value))} is not supported (supported: {supported})"
        )
