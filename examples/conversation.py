"""A conversation in turns: each starts where the last one ended and computes only what is new."""

from draftwerk import Engine, SamplingParams

params = SamplingParams(max_tokens=12, stop=["\n"])

with Engine("gemma-3-270m") as engine, engine.conversation() as conversation:
    sequence = engine.tokenize("Questions and short answers about rivers.")
    for question in ("Which river flows through Paris?", "And through London?", "And through Vienna?"):
        sequence += engine.tokenize(f"\nQuestion: {question}\nAnswer:", add_bos=False)
        completion = engine.submit(sequence, params, conversation=conversation).result()
        computed = completion.stats.prompt_tokens - completion.stats.cached_tokens
        print(f"{question}{completion.text} ({computed} of {len(sequence)} prompt tokens computed)")
        sequence += completion.token_ids
