"""Reading checkpoints (GGUF files, Hugging Face directories): weights, configuration, tokenizer, chat template.

Everything in a file is checked before it is used; whatever is wrong with it ends in :class:`CheckpointError`.
"""

from draftwerk.loading.builtin import BUILTIN_MODELS, BuiltinModel, resolve_builtin, shipped_drafter
from draftwerk.loading.chat_template import ChatTemplate, ChatTemplateError
from draftwerk.loading.checkpoint import AssistantCheckpoint, Checkpoint
from draftwerk.loading.config import AssistantConfig, TextConfig
from draftwerk.loading.drafter_fit import check_fits, find_assistant
from draftwerk.loading.errors import CheckpointError
from draftwerk.loading.hub import is_hub_name
from draftwerk.loading.opening import is_assistant, open_assistant, open_checkpoint, path_exists
from draftwerk.loading.tensors import TensorView
from draftwerk.loading.tokenizer import Tokenizer

__all__ = [
    "BUILTIN_MODELS",
    "AssistantCheckpoint",
    "AssistantConfig",
    "BuiltinModel",
    "ChatTemplate",
    "ChatTemplateError",
    "Checkpoint",
    "CheckpointError",
    "TensorView",
    "TextConfig",
    "Tokenizer",
    "check_fits",
    "find_assistant",
    "is_assistant",
    "is_hub_name",
    "open_assistant",
    "open_checkpoint",
    "path_exists",
    "resolve_builtin",
    "shipped_drafter",
]
