"""Text from a prompt, in ten lines."""

from draftwerk import Engine, SamplingParams

with Engine("gemma-3-270m") as engine:
    completion = engine.generate("The history of the steam engine begins", SamplingParams(max_tokens=40))
    print(completion.text)
    print(f"{completion.stats.tokens_per_step:.2f} tokens per step")
