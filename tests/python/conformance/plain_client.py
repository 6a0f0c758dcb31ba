"""A short program with draftwerk-client, for test_python_versions.py to run with other Pythons."""

from __future__ import annotations

import asyncio
import json
import sys

from draftwerk_client import AsyncClient, Client, InvalidRequest


def in_threads(address: str) -> list[list[int]]:
    with Client(address, timeout=60.0) as client:
        whole = client.generate("hello world", temperature=1.0, seed=4, max_tokens=16)
        with client.stream("hello world", temperature=1.0, seed=4, max_tokens=16) as stream:
            streamed = [token for chunk in stream for token in chunk.token_ids]
        with client.session(temperature=1.0, seed=4, max_tokens=16) as session:
            session.append("hello world")
            turn = session.generate()
        try:
            client.generate("hello world", top_p=2.0)
        except InvalidRequest as error:
            assert error.violations[0].field == "sampling.top_p"
        else:
            raise AssertionError("top_p = 2 was taken")
        return [list(whole.token_ids), streamed, list(turn.token_ids)]


async def in_asyncio(address: str) -> list[list[int]]:
    async with AsyncClient(address, timeout=60.0) as client:
        whole = await client.generate("hello world", temperature=1.0, seed=4, max_tokens=16)
        async with client.session(temperature=1.0, seed=4, max_tokens=16) as session:
            await session.append("hello world")
            turn = await session.generate()
        return [list(whole.token_ids), list(turn.token_ids)]


if __name__ == "__main__":
    results = in_threads(sys.argv[1]) + asyncio.run(in_asyncio(sys.argv[1]))
    json.dump({"python": list(sys.version_info[:2]), "token_ids": results}, sys.stdout)
