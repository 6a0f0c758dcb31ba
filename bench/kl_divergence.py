#!/usr/bin/env python3
"""How far the engine's next-token distributions are from exact arithmetic on the same weights.

The reference is transformers in float32 on the dequantised weights of the GGUF file. Compared with it over the same
positions of the same text, window by window:

- draftwerk on the file as it is, on the same weights stored as F32 (what its kernels lose apart from rounding
  activations and keys and values), and on these as --weights bf16, int8, int4 and fp8 convert them on loading;
- with --llama-bin, llama.cpp on both files. llama-perplexity writes each position's log-probabilities to a file
  (--kl-divergence-base), rounded to 16 bits over the upper 16 nats; they are compared with the reference by the same
  code as ours. Its own figure (--kl-divergence: the file against the F32 file, both through llama.cpp) is printed too.

Windows and positions are llama-perplexity's: the text in windows of --context tokens, the first token of each replaced
by <bos>, and the second half of every window counts. Tokens with a log-probability of -16 or less in the reference are
left out of the sum, as llama-perplexity does.

Positions of a window share their text, so the standard error of a mean is that of the windows' means.

    python bench/kl_divergence.py --llama-bin ~/llama.cpp/build/bin --json kl.json
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers

from draftwerk.loading import open_checkpoint
from draftwerk.weights import load_model

Floats = npt.NDArray[np.floating[Any]]
LogProbabilities = Callable[[int], Callable[[int], Floats]]
"""Window, then counted position in it, to log-probabilities [vocabulary]."""

LOWEST_LOG_PROBABILITY = -16.0

HUGGING_FACE_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Divergence:
    """How one implementation compares with the reference, over all positions."""

    name: str
    mean_kl: float
    standard_error: float  # of the windows' means
    median_kl: float
    p99_kl: float
    max_kl: float
    same_top_token: float  # share of positions at which the most probable token is the same
    perplexity: float


class Comparison:
    """Gathers the divergence of one implementation from the reference, over windows of as many positions each."""

    def __init__(self, name: str, windows: int) -> None:
        self.name = name
        self._windows = windows
        self._kl: list[float] = []
        self._same_top = 0
        self._log_likelihood = 0.0

    def add(self, reference: Floats, other: Floats, next_token: int) -> None:
        """One position: log-probabilities [vocabulary] of both."""
        counted = reference > LOWEST_LOG_PROBABILITY
        p = reference[counted]
        self._kl.append(float(np.sum(np.exp(p) * (p - other[counted]))))
        self._same_top += int(np.argmax(reference) == np.argmax(other))
        self._log_likelihood += float(other[next_token])

    def result(self) -> Divergence:
        kl = np.array(self._kl)
        means = kl.reshape(self._windows, -1).mean(axis=1)
        return Divergence(
            name=self.name,
            mean_kl=float(kl.mean()),
            standard_error=float(means.std(ddof=1) / np.sqrt(means.size)),
            median_kl=float(np.median(kl)),
            p99_kl=float(np.percentile(kl, 99)),
            max_kl=float(kl.max()),
            same_top_token=self._same_top / kl.size,
            perplexity=float(np.exp(-self._log_likelihood / kl.size)),
        )


def default_text() -> str:
    """English that comes with every Python: the language reference as pydoc shows it, long topics first."""
    from pydoc_data.topics import topics

    return "\n".join(sorted(topics.values(), key=len, reverse=True))


# --- the reference -----------------------------------------------------------------------------------------------


def reference_model(path: Path) -> transformers.Gemma3ForCausalLM:
    """transformers in float32, built from the GGUF file alone (independent of draftwerk's readers).

    Raises:
        ValueError: the file's model is one that this does not build right.
    """
    reader = gguf.GGUFReader(path)
    refuse_others(path, {k: field.contents() for k, field in reader.fields.items() if not k.startswith("tokenizer.")})

    def value(key: str, default: Any = None) -> Any:
        stored = reader.get_field(f"gemma3.{key}")
        if stored is None and default is None:
            raise ValueError(f"{path}: metadata gemma3.{key} is missing")
        return default if stored is None else stored.contents()

    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantized(tensor).copy())
        name = hugging_face_name(tensor.name)
        state[name] = values - 1.0 if values.dim() == 1 else values  # GGUF stores 1 + w of the norms
    state["lm_head.weight"] = state["model.embed_tokens.weight"]

    heads = int(value("attention.head_count"))
    config = transformers.Gemma3TextConfig(
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        hidden_size=int(value("embedding_length")),
        intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=int(value("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(value("attention.head_count_kv", heads)),
        head_dim=int(value("attention.key_length")),
        query_pre_attn_scalar=int(value("attention.key_length")),
        sliding_window=int(value("attention.sliding_window")),
        max_position_embeddings=int(value("context_length")),
        rms_norm_eps=float(value("attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": float(value("rope.freq_base", 1e6))},
        },
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(config)
    # Everything but the weights (RoPE frequencies, the embedding's scale) is computed, so build those for real.
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=True)
    rebuilt = transformers.Gemma3ForCausalLM(shrunk(config))
    model.model.rotary_emb = rebuilt.model.rotary_emb
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model.float().eval()


def refuse_others(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for what reference_model() leaves out."""
    of = {key.removeprefix("gemma3."): value for key, value in metadata.items()}
    key_length = of.get("attention.key_length")
    left_out = {
        "an architecture other than gemma3": of.get("general.architecture") != "gemma3",
        "RoPE scaling": of.get("rope.scaling.type", "none") != "none" or of.get("rope.scaling.factor", 1.0) != 1.0,
        "a RoPE base of sliding layers other than 10,000": of.get("rope.freq_base_swa", 10_000.0) != 10_000.0,
        "values of another length than keys": of.get("attention.value_length", key_length) != key_length,
        "full layers other than every sixth": of.get("attention.sliding_window_pattern", 6) != 6,
        "soft-capped logits": bool(of.get("final_logit_softcapping")),
        # GGUF does not say how attention is scaled; that of the 27B, which has 62 layers, is not by the length of keys.
        "the 27B's scale of attention": of.get("block_count") == 62,
    }
    for what, is_left_out in left_out.items():
        if is_left_out:
            raise ValueError(f"{path}: has {what}, which the reference does not compute")


def shrunk(config: transformers.Gemma3TextConfig) -> transformers.Gemma3TextConfig:
    """The same heads and positions with next to no weights."""
    small = type(config)(**{**config.to_dict(), "vocab_size": 16, "intermediate_size": 16, "hidden_size": 16})
    small.num_hidden_layers = 1
    return small


def hugging_face_name(name: str) -> str:
    if name in ("token_embd.weight", "output_norm.weight"):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{HUGGING_FACE_NAMES[part]}.{suffix}"


def dequantized(tensor: gguf.ReaderTensor) -> npt.NDArray[np.float32]:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    shape = [int(size) for size in reversed(tensor.shape)]
    return np.ascontiguousarray(values, dtype=np.float32).reshape(shape)


def write_f32_gguf(source: Path, target: Path) -> None:
    """The same model with every tensor stored as F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gemma3")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantized(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


# --- llama.cpp ---------------------------------------------------------------------------------------------------


class LlamaLogProbabilities:
    """The file that llama-perplexity writes with --kl-divergence-base (tools/perplexity/perplexity.cpp): the tokens,
    and of each counted position float32 scale, float32 lowest log-probability, uint16 per token of the vocabulary."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(8) != b"_logits_":
                raise ValueError(f"{path}: not written by llama-perplexity")
            self.context, self.vocabulary, self.windows = np.fromfile(file, np.int32, 3).tolist()
            self.tokens = np.fromfile(file, np.int32, self.windows * self.context).reshape(self.windows, self.context)
            start = file.tell()
        self.rows_per_window = self.context - 1 - self.context // 2
        row = 2 * ((self.vocabulary + 1) // 2) + 4
        self._rows = np.memmap(path, np.uint16, "r", start, (self.windows * self.rows_per_window, row))

    def row(self, window: int, index: int) -> npt.NDArray[np.float64]:
        stored = self._rows[window * self.rows_per_window + index]
        scale, lowest = stored[:4].copy().view(np.float32).astype(np.float64)
        return stored[4 : 4 + self.vocabulary] * scale + lowest


class LlamaPerplexity:
    """Runs llama-perplexity."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._binary = directory / "llama-perplexity"
        self._threads = threads
        self._environment = {**os.environ, "LD_LIBRARY_PATH": f"{directory}:{os.environ.get('LD_LIBRARY_PATH', '')}"}

    def save(self, model: Path, text: Path, context: int, windows: int, target: Path) -> LlamaLogProbabilities:
        self._run("-m", model, "-f", text, "-c", context, "--chunks", windows, "--kl-divergence-base", target)
        return LlamaLogProbabilities(target)

    def own_mean_kl(self, model: Path, base: Path) -> float:
        output = self._run("-m", model, "--kl-divergence-base", base, "--kl-divergence")
        match = re.search(r"Mean\s+KLD:\s*(-?[\d.]+)", output)
        if match is None:
            raise ValueError(f"llama-perplexity printed no mean KLD:\n{output[-2000:]}")
        return float(match[1])

    def _run(self, *arguments: object) -> str:
        command = [str(self._binary), *map(str, arguments), "-t", str(self._threads)]
        process = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr[-2000:]}")
        return process.stdout + process.stderr


# --- measuring ---------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="GGUF file or built-in name")
    parser.add_argument("--text", type=Path, help="UTF-8 text; default: Python's language reference (pydoc topics)")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument(
        "--windows", type=int, default=8, help="windows, at least 2; each counts context / 2 - 1 positions"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--llama-bin", type=Path, help="directory with llama-perplexity and its libraries")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.windows < 2:
        parser.error("--windows: with fewer than 2 there is no standard error")
    return arguments


def from_llama(saved: LlamaLogProbabilities) -> LogProbabilities:
    return lambda window: lambda index: saved.row(window, index)


def from_draftwerk(core: Any, windows: npt.NDArray[np.int32]) -> LogProbabilities:
    def of_window(window: int) -> Callable[[int], Floats]:
        logits = core.logits(windows[window].tolist())[windows.shape[1] // 2 : -1]
        return lambda index: log_softmax(logits[index])

    return of_window


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Compares everything asked for. `work` takes about 1 GiB, and 1 GiB per llama.cpp file at 2,000 positions."""
    checkpoint = open_checkpoint(arguments.model)
    path = Path(checkpoint.path)
    assert checkpoint.tokenizer is not None
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else default_text()
    # More than enough characters for the windows, and few enough to be tokenised quickly.
    text = text[: 12 * arguments.context * arguments.windows]
    tokens = checkpoint.tokenizer.encode(text, add_bos=True)[: arguments.windows * arguments.context]
    if len(tokens) < arguments.windows * arguments.context:
        raise SystemExit(f"the text has {len(tokens)} tokens, fewer than {arguments.windows * arguments.context}")
    windows = np.array(tokens, np.int32).reshape(arguments.windows, arguments.context)

    print("writing the weights as F32", file=sys.stderr)
    f32_path = work / "f32.gguf"
    write_f32_gguf(path, f32_path)

    implementations: dict[str, LogProbabilities] = {}
    own_kl = None
    if arguments.llama_bin is not None:
        text_file = work / "text.txt"
        text_file.write_text(text, encoding="utf-8")
        llama = LlamaPerplexity(arguments.llama_bin, arguments.threads or os.cpu_count() or 1)
        for name, model in (("llama.cpp", path), ("llama.cpp, F32 weights", f32_path)):
            print(f"{name}: running llama-perplexity", file=sys.stderr)
            saved = llama.save(model, text_file, arguments.context, arguments.windows, work / f"{model.stem}.kld")
            if not np.array_equal(saved.tokens[:, 1:], windows[:, 1:]):
                raise SystemExit("llama.cpp and draftwerk tokenise the text differently")
            implementations[name] = from_llama(saved)
        print("llama.cpp: its own --kl-divergence", file=sys.stderr)
        own_kl = llama.own_mean_kl(path, work / "f32.kld")

    windows[:, 0] = checkpoint.bos_token_id
    half = arguments.context // 2
    subjects = [("draftwerk", path, "auto"), ("draftwerk, F32 weights", f32_path, "auto")]
    subjects += [
        (f"draftwerk, F32 weights as {weights}", f32_path, weights) for weights in ("bf16", "int8", "int4", "fp8")
    ]
    cores = {
        name: load_model(open_checkpoint(model), weights=weights, threads=arguments.threads)
        for name, model, weights in subjects
    }
    for name, core in cores.items():
        implementations[name] = from_draftwerk(core, windows)

    comparisons = [Comparison(name, arguments.windows) for name in implementations]
    reference = reference_model(path)
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    for window, ids in enumerate(windows):
        print(f"window {window + 1} of {len(windows)}", file=sys.stderr)
        with torch.inference_mode():
            exact = reference(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, half:-1].numpy()
        rows = [log_probabilities(window) for log_probabilities in implementations.values()]
        for i in range(len(exact)):
            log_p = log_softmax(exact[i])
            for comparison, row in zip(comparisons, rows, strict=True):
                comparison.add(log_p, row(i), int(ids[half + i + 1]))
    return {
        "model": checkpoint.name,
        "positions": len(windows) * (arguments.context - 1 - half),
        "context": arguments.context,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "machine": cores["draftwerk"].description,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "results": [asdict(comparison.result()) for comparison in comparisons],
        "llama_perplexity_mean_kld": own_kl,
    }


def markdown(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{report['model']}, {report['positions']} positions in windows of {report['context']} tokens, "
        f"{report['machine']}, {report['date']}, text sha256 {report['text_sha256'][:16]}"
    )
    yield ""
    yield "| | mean KL (nats) | standard error | median | 99% | largest | same top token | perplexity |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in report["results"]:
        yield (
            f"| {r['name']} | {r['mean_kl']:.2e} | {r['standard_error']:.1e} | {r['median_kl']:.2e} "
            f"| {r['p99_kl']:.2e} | {r['max_kl']:.2e} | {r['same_top_token']:.2%} | {r['perplexity']:.4f} |"
        )
    if report["llama_perplexity_mean_kld"] is not None:
        yield ""
        yield f"llama-perplexity's own mean KLD, against the F32 file: {report['llama_perplexity_mean_kld']:.6f}"


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="kl-divergence-") as work:
        report = measure(arguments, Path(work))
    print("\n".join(markdown(report)))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
