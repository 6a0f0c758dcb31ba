"""Many prompts at once, each with its own parameters. The batch does not change what any of them gets."""

from draftwerk import Engine, SamplingParams

prompts = ["The capital of France is", "Water boils at", "The three primary colours are"]
params = [SamplingParams(max_tokens=16, temperature=1.0, top_k=64, seed=seed) for seed in range(len(prompts))]

with Engine("gemma-3-270m") as engine:
    together = engine.generate(prompts, params)
    alone = [engine.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    for prompt, completion in zip(prompts, together, strict=True):
        print(f"{prompt}{completion.text!r}")
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    print("the same tokens alone and together")
