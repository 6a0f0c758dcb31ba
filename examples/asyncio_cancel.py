"""asyncio: several streams side by side, and one that is given up halfway."""

import asyncio

from draftwerk import Engine, SamplingParams


async def read(engine: Engine, prompt: str) -> str:
    pieces = [chunk.text async for chunk in engine.astream(prompt, SamplingParams(max_tokens=24))]
    return "".join(pieces)


async def main() -> None:
    with Engine("gemma-3-270m") as engine:
        endless = asyncio.create_task(
            engine.agenerate("Once upon a time", SamplingParams(max_tokens=10_000, ignore_eos=True))
        )
        for text in await asyncio.gather(read(engine, "The sea is"), read(engine, "A good library has")):
            print(text)
        endless.cancel()  # cancels the request too: its memory is free at once
        print("cancelled:", (await asyncio.gather(endless, return_exceptions=True))[0].__class__.__name__)


asyncio.run(main())
