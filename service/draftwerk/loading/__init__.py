"""Reading checkpoints (GGUF files, Hugging Face directories): weights, configuration, tokenizer, chat template.

Everything in a file is checked before it is used; whatever is wrong with it ends in :class:`CheckpointError`.
"""

from draftwerk.loading.builtin import BUILTIN_MODELS, BuiltinModel, resolve_builtin
from draftwerk.loading.chat_template import ChatTemplate, ChatTemplateError
from draftwerk.loading.checkpoint import Checkpoint, TensorView, open_checkpoint
from draftwerk.loading.config import TextConfig
from draftwerk.loading.errors import CheckpointError
from draftwerk.loading.tokenizer import Tokenizer

__all__ = [
    "BUILTIN_MODELS",
    "BuiltinModel",
    "ChatTemplate",
    "ChatTemplateError",
    "Checkpoint",
    "CheckpointError",
    "TensorView",
    "TextConfig",
    "Tokenizer",
    "open_checkpoint",
    "resolve_builtin",
]
