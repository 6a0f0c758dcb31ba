"""Which drafter belongs to a model: the one beside it, and whether one that is given can read the model's K/V."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from draftwerk.loading import hub
from draftwerk.loading.builtin import BUILTIN_MODELS, shipped_drafter
from draftwerk.loading.checkpoint import AssistantCheckpoint, Checkpoint
from draftwerk.loading.config import FULL
from draftwerk.loading.errors import CheckpointError
from draftwerk.loading.opening import is_assistant

_logger = logging.getLogger(__name__)
_SUFFIX = "-assistant"


def find_assistant(model: str | os.PathLike[str]) -> Path | None:
    """The drafter that lies beside a model under the same name with ``-assistant`` behind it.

    Beside a directory that is a directory, beside a GGUF file a GGUF file. For a name on the hub, or a directory of its
    cache, it is a name there, which is downloaded if need be. What has that name and says that it is something else is
    left alone: nobody asked for it. For a built-in model it is the one that comes with draftwerk, unless one lies
    beside its file.

    Args:
        model: as for :func:`draftwerk.loading.open_checkpoint`.

    Returns:
        What :func:`draftwerk.loading.open_assistant` takes; ``None`` if there is none.
    """
    name = os.fspath(model)
    # Absolute, for "." and "..", but not resolved: a link has its drafter beside it.
    path = Path(os.path.abspath(name))  # noqa: PTH100 (Path.absolute() keeps "..")
    if path.is_file():
        beside = path.with_name(f"{path.stem}{_SUFFIX}.gguf")
        return beside if is_assistant(beside) else shipped_drafter(path)
    if path.is_dir():
        name = hub.cached_name(path) or ""
        if not name:
            beside = path.parent / (path.name + _SUFFIX)
            return beside if is_assistant(beside) else None
    if name in BUILTIN_MODELS:
        return shipped_drafter(name)
    if not hub.is_hub_name(name):
        return None
    try:
        # The configuration first: something else of that name may have gigabytes of weights.
        if not is_assistant(hub.download(name + _SUFFIX, ["config.json"])):
            return None
        return hub.checkpoint_directory(name + _SUFFIX)
    except hub.NotOnHubError:
        return None
    except CheckpointError as error:
        _logger.warning("no drafter is used: %s", error)
        return None


def check_fits(assistant: AssistantCheckpoint, target: Checkpoint) -> None:
    """Makes sure that a drafter can read the keys, values and hidden states of a target, of whichever architecture.

    Raises:
        CheckpointError: it was made for another one; says what differs, and both values.
    """
    drafter, model = assistant.config.text, target.config

    def compare(what: str, expected: object, actual: object) -> None:
        if expected != actual:
            raise CheckpointError(
                assistant.path, f"does not fit {target.name}: it is for {what} {expected}, and the model has {actual}"
            )

    compare("hidden size", assistant.config.backbone_hidden_size, model.hidden_size)
    compare("a vocabulary of", drafter.vocab_size, model.vocab_size)
    owned = model.layer_types[: model.first_shared_layer]
    for kind in dict.fromkeys(drafter.layer_types):
        name = kind.replace("_attention", " layers")
        if kind not in owned:
            raise CheckpointError(
                assistant.path, f"does not fit {target.name}: it reads the K/V of {name}, and the model has none"
            )
        compare(f"{name} with head size", drafter.head_dim_of(kind), model.head_dim_of(kind))
        compare(f"{name} with KV heads", drafter.kv_heads_of(kind), model.kv_heads_of(kind))
        if kind == FULL:
            compare(f"{name} with RoPE base", drafter.rope_theta, model.rope_theta)
            compare(f"{name} with RoPE factor", drafter.rope_scaling_factor, model.rope_scaling_factor)
            share, models_share = drafter.rope_partial_rotary_factor, model.rope_partial_rotary_factor
            compare(f"{name} with a rotating share of", share, models_share)
        else:
            compare(f"{name} with a window of", drafter.sliding_window, model.sliding_window)
            compare(f"{name} with RoPE base", drafter.rope_local_theta, model.rope_local_theta)
