"""Text as it comes, with the drafted tokens of each step counted; a stop string ends it."""

from draftwerk import Engine, SamplingParams

params = SamplingParams(max_tokens=60, stop=["\n\n"])

with Engine("gemma-3-270m") as engine:
    for chunk in engine.stream("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday,", params):
        print(chunk.text, end="", flush=True)
        if chunk.stats is not None:
            print(f"\n{chunk.finish_reason}: {chunk.stats.accepted} of {chunk.stats.drafted} drafts accepted")
