"""Client of Draftwerk, the reproducible server of Gemma models: Client for synchronous code, AsyncClient for asyncio.

with Client("127.0.0.1:50051") as client:
    print(client.generate("The history of", max_tokens=40).text)
"""

from draftwerk_client.async_client import AsyncClient
from draftwerk_client.async_session import AsyncSession
from draftwerk_client.client import Client
from draftwerk_client.errors import (
    Cancelled,
    DeadlineExceeded,
    DraftwerkError,
    FieldViolation,
    InvalidRequest,
    NotFound,
    OutOfOrder,
    QueueFull,
    ServerError,
    Unavailable,
)
from draftwerk_client.parameters import Chat, GenerationOptions, Message, Prompt, RequestOptions
from draftwerk_client.reply import Reply, ReplyPart, ReplyReader, ToolCall, read_reply, reply_opening
from draftwerk_client.results import (
    Appended,
    CacheStats,
    Chunk,
    Completion,
    DrafterStats,
    EngineTime,
    FinishReason,
    GenerationStats,
    Injected,
    Model,
    Stats,
    TokenLogprobs,
    Tokens,
)
from draftwerk_client.session import Session
from draftwerk_client.stream import AsyncStream, Stream

__all__ = [
    "Appended",
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "CacheStats",
    "Cancelled",
    "Chat",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "DrafterStats",
    "DraftwerkError",
    "EngineTime",
    "FieldViolation",
    "FinishReason",
    "GenerationOptions",
    "GenerationStats",
    "Injected",
    "InvalidRequest",
    "Message",
    "Model",
    "NotFound",
    "OutOfOrder",
    "Prompt",
    "QueueFull",
    "Reply",
    "ReplyPart",
    "ReplyReader",
    "RequestOptions",
    "ServerError",
    "Session",
    "Stats",
    "Stream",
    "TokenLogprobs",
    "Tokens",
    "ToolCall",
    "Unavailable",
    "read_reply",
    "reply_opening",
]
__version__ = "0.1.0"
