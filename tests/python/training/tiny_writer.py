"""A tiny random model with a tokenizer of bytes that writes text; as a program, until it is killed.

python tiny_writer.py MODEL TEXT SHARDS STREAMS
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast

from draftwerk import Engine
from draftwerk.loading import Checkpoint, Tokenizer, open_checkpoint
from draftwerk.training.text import TextOptions, TextWriter
from fake_checkpoint import ByteTokenizer

OPTIONS = TextOptions(seed=3, max_tokens=150, texts_per_shard=64, streams=8)


def with_tokenizer(directory: Path, **changes: Any) -> Checkpoint:
    """The checkpoint with a tokenizer of bytes; tiny models are saved without one."""
    tokenizer = cast(Tokenizer, ByteTokenizer())
    return dataclasses.replace(open_checkpoint(directory), tokenizer=tokenizer, **changes)


def tiny_engine(checkpoint: Checkpoint, **options: Any) -> Engine:
    return Engine(checkpoint, **{"threads": 1, "kv_memory": "16MiB", "drafter": "none", **options})


if __name__ == "__main__":
    model, directory, shards, streams = sys.argv[1:]
    with tiny_engine(with_tokenizer(Path(model))) as engine:
        writer = TextWriter(engine, Path(directory), dataclasses.replace(OPTIONS, streams=int(streams)))
        print(writer.shards, flush=True)
        while writer.shards < int(shards):
            writer.write_shard()
            print(writer.shards, flush=True)
