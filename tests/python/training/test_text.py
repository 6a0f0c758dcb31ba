"""Text that a target writes: the same whatever happens meanwhile, cut at loops, and in files that are whole."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny_writer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_writer import OPTIONS, tiny_engine

import tiny_checkpoint
from draftwerk import Engine
from draftwerk.loading import Checkpoint
from draftwerk.training.errors import TrainingError
from draftwerk.training.prompts import PromptsFile, read_prompts
from draftwerk.training.repetition import length_before_loop
from draftwerk.training.sampling import Sampling
from draftwerk.training.shards import ENDS, Shard, Text, count_shards, read_shard, shard_path, write_shard
from draftwerk.training.text import KINDS, TextOptions, TextWriter, planned_texts
from fake_checkpoint import VOCABULARY, FakeCheckpoint

SHARDS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.save(
        tiny_checkpoint.tiny_model(vocab_size=VOCABULARY, logit_scale=0.3), tmp_path_factory.mktemp("model") / "tiny"
    )


@pytest.fixture(scope="module")
def written(target: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, written without a break."""
    directory = tmp_path_factory.mktemp("text")
    write(target, directory, SHARDS)
    return directory


def write(target: Checkpoint, directory: Path, shards: int, *, drafter: str = "none", streams: int = 8) -> None:
    with tiny_engine(target, drafter=drafter) as engine:
        writer = TextWriter(engine, directory, dataclasses.replace(OPTIONS, streams=streams))
        while writer.shards < shards:
            writer.write_shard()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def prompts_file(tmp_path: Path, text: str) -> PromptsFile:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


# --- what is written ---------------------------------------------------------------------------------------------


def test_texts_are_what_the_engine_generates_for_the_plan(target: Checkpoint, written: Path) -> None:
    with tiny_engine(target) as engine:
        plans = list(islice(planned_texts(engine, OPTIONS), SHARDS * OPTIONS.texts_per_shard))
        texts = [text for number in range(SHARDS) for text in read_shard(written, number).texts()]
        assert len(texts) == len(plans)
        for plan, text in zip(plans, texts, strict=True):
            completion = engine.generate(list(plan.prompt_ids), plan.params)
            kept = length_before_loop(completion.token_ids)
            assert text.token_ids.tolist() == [*plan.prompt_ids, *completion.token_ids[:kept]]
            assert (text.prompt_length, text.kind) == (len(plan.prompt_ids), plan.kind)
            if kept < len(completion.token_ids):
                assert ENDS[text.end] == "loop"
            else:
                assert ENDS[text.end] == {"stop": "end token", "length": "length"}[completion.finish_reason]
    assert {text.kind for text in texts} == set(range(len(KINDS)))


@pytest.mark.parametrize(("streams", "drafter"), [(1, "none"), (24, "lookup")])
def test_neither_streams_nor_drafts_change_a_byte(
    target: Checkpoint, written: Path, tmp_path: Path, streams: int, drafter: str
) -> None:
    write(target, tmp_path, 1, streams=streams, drafter=drafter)
    assert contents(tmp_path).items() <= contents(written).items()


def test_loops_are_cut(engine: Engine, tmp_path: Path) -> None:
    # The scripted core repeats its prompt for ever.
    prompts = prompts_file(tmp_path, "twelve bytes\nfive5\n")
    options = TextOptions(max_tokens=100, texts_per_shard=4, streams=2)
    TextWriter(engine, tmp_path / "text", options, prompts).write_shard()
    shard = read_shard(tmp_path / "text", 0)
    assert [ENDS[text.end] for text in shard.texts()] == ["loop"] * 4
    generated = {int(text.prompt_length): len(text.token_ids) - text.prompt_length for text in shard.texts()}
    assert generated == {13: 26, 6: 12}  # two rounds, of <bos> and the bytes
    assert shard.generated_tokens == 2 * (26 + 12)


def test_shares_and_lengths_are_as_stated(engine: Engine) -> None:
    options = TextOptions(seed=1, max_tokens=100)
    plans = list(islice(planned_texts(engine, options), 2000))
    shares = [sum(plan.kind == kind for plan in plans) / len(plans) for kind in range(len(KINDS))]
    assert sum(kind.share for kind in KINDS) == pytest.approx(1.0)
    # Greedy a little less: not from <bos> alone, and not twice from one prompt.
    assert shares == pytest.approx([kind.share for kind in KINDS], abs=0.07)
    assert {plan.params.max_tokens for plan in plans} == {100, 300}
    assert 0.08 < sum(plan.params.max_tokens == 300 for plan in plans) / len(plans) < 0.17
    assert len({plan.params.seed for plan in plans}) == len(plans)
    greedy = [plan.prompt_ids for plan in plans if plan.params.temperature == 0.0]
    assert len(set(greedy)) == len(greedy)
    assert min(map(len, greedy)) > 1


@pytest.mark.parametrize("served", [Sampling(0.6, 20, 0.8), Sampling(0.0, 0, 1.0)])
def test_texts_are_sampled_as_the_model_will_be_served(engine: Engine, served: Sampling) -> None:
    seen: set[tuple[int, ...]] = set()
    for plan in islice(planned_texts(engine, TextOptions(served=served)), 200):
        given = Sampling(plan.params.temperature, plan.params.top_k, plan.params.top_p)
        if served.temperature == 0.0 and (len(plan.prompt_ids) == 1 or plan.prompt_ids in seen):
            assert given.temperature > 0.0  # it would be the text that was there before
        else:
            assert given == served
        seen.add(plan.prompt_ids)


def test_another_seed_is_another_text(engine: Engine) -> None:
    def begin(seed: int) -> list[tuple[int, ...]]:
        return [plan.prompt_ids for plan in islice(planned_texts(engine, TextOptions(seed=seed)), 64)]

    assert begin(5) == begin(5)
    assert sum(a == b for a, b in zip(begin(5), begin(6), strict=True)) < 8


def test_models_with_a_chat_template_are_asked_through_it(engine: Engine) -> None:
    texts = [engine.detokenize(plan.prompt_ids) for plan in islice(planned_texts(engine, TextOptions()), 200)]
    assert 150 < sum(text.startswith("<user>") for text in texts) < 195


# --- prompts of the user -----------------------------------------------------------------------------------------


def test_every_prompt_has_its_turn_and_is_continued_greedily_once(engine: Engine, tmp_path: Path) -> None:
    lines = [f"prompt {i}" for i in range(40)]
    prompts = prompts_file(tmp_path, "\n".join(lines))
    plans = list(islice(planned_texts(engine, TextOptions(), prompts), 120))
    for turn in range(3):
        texts = [engine.detokenize(plan.prompt_ids) for plan in plans[40 * turn : 40 * turn + 40]]
        assert sorted(texts) == sorted(lines)
    assert [plan.prompt_ids for plan in plans[:40]] != [plan.prompt_ids for plan in plans[40:80]]
    greedy = [plan.prompt_ids for plan in plans if plan.kind == 0]
    assert greedy
    assert len(set(greedy)) == len(greedy)


def test_chat_messages_go_through_the_template(engine: Engine, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, '{"messages": [{"role": "user", "content": "Hi"}]}')
    plan = next(planned_texts(engine, TextOptions(), prompts))
    assert engine.detokenize(plan.prompt_ids) == "<user>Hi"


def test_a_prompt_that_cannot_be_used_is_named_at_once(
    engine: Engine, checkpoint: FakeCheckpoint, tmp_path: Path
) -> None:
    prompts = prompts_file(tmp_path, "short\n" + "x" * 5000)
    with pytest.raises(TrainingError, match=r"prompts.txt:2: a prompt of 5001 tokens: must be at most 3968"):
        TextWriter(engine, tmp_path / "text", TextOptions(), prompts)
    checkpoint.chat_template = None
    with Engine("fake-model") as plain:
        prompts = prompts_file(tmp_path, '{"prompt": "a"}\n{"messages": [{"role": "user", "content": "Hi"}]}')
        with pytest.raises(TrainingError, match=r"prompts.txt:2: .*no chat template"):
            TextWriter(plain, tmp_path / "text", TextOptions(), prompts)


def test_long_prompts_leave_less_room(engine: Engine, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path, "x" * 3900)
    plan = next(planned_texts(engine, TextOptions(), prompts))
    assert plan.params.max_tokens == 4096 - 3901


def test_a_model_without_a_tokenizer_is_refused(core: object, checkpoint: FakeCheckpoint, tmp_path: Path) -> None:
    checkpoint.tokenizer = None
    with Engine("fake-model") as engine, pytest.raises(TrainingError, match="fake-model has no tokenizer"):
        TextWriter(engine, tmp_path, TextOptions())


@pytest.mark.parametrize(
    ("field", "value"), [("seed", -1), ("max_tokens", 0), ("texts_per_shard", 0), ("streams", 0), ("streams", 2000)]
)
def test_options_out_of_range_are_named(field: str, value: int) -> None:
    with pytest.raises(TrainingError, match=f"{field} = {value}: must be "):
        TextOptions(**{field: value})


# --- going on ----------------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_at_any_moment_goes_on_with_the_same_bytes(
    model: Path, target: Checkpoint, written: Path, tmp_path: Path
) -> None:
    moments = random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tiny_writer.__file__, str(model), str(tmp_path), str(SHARDS)]
    kills = 0
    while True:
        arguments = [*command, str(moments.choice((1, 2, 5)))]
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            before = process.stdout.readline()  # it is writing now
            assert before, "the writer failed"
            if kills == 4 or int(before) == SHARDS:
                assert process.wait() == 0
                break
            time.sleep(moments.uniform(0.0, 0.5))
            process.kill()
        kills += 1
        for number in range(count_shards(tmp_path)):
            read_shard(tmp_path, number)  # whole
    assert kills > 0
    assert contents(tmp_path) == contents(written)


def test_leftovers_of_a_kill_are_removed(engine: Engine, tmp_path: Path) -> None:
    leftover = tmp_path / ".shard-000000.npz.abcdefgh"
    leftover.write_bytes(b"half")
    TextWriter(engine, tmp_path, TextOptions())
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 9}, "seed = 0, not 9"),
        ({"max_tokens": 10}, "max_tokens = 512, not 10"),
        ({"texts_per_shard": 8}, "texts_per_shard = 256, not 8"),
    ],
)
def test_other_text_is_not_gone_on_with(
    engine: Engine, tmp_path: Path, changes: dict[str, int], difference: str
) -> None:
    TextWriter(engine, tmp_path, TextOptions())
    TextWriter(engine, tmp_path, TextOptions(streams=3))  # makes no difference
    with pytest.raises(TrainingError, match=f"was written with {difference}"):
        TextWriter(engine, tmp_path, TextOptions(**changes))


def test_text_of_another_model_or_other_prompts_is_not_gone_on_with(
    engine: Engine, checkpoint: FakeCheckpoint, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    TextWriter(engine, text, TextOptions())
    with pytest.raises(TrainingError, match=r"openings_sha256 = \w+, not None"):
        TextWriter(engine, text, TextOptions(), prompts_file(tmp_path, "a"))
    checkpoint.name = "another"
    with Engine("another") as other, pytest.raises(TrainingError, match="model = fake-model, not another"):
        TextWriter(other, text, TextOptions())


def test_a_damaged_manifest_is_one_line(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(TrainingError, match=r"text\.json is damaged .*begin in another directory"):
        TextWriter(engine, tmp_path, TextOptions())


def test_a_full_disk_leaves_what_was_there(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TextOptions(max_tokens=8, texts_per_shard=4)
    writer = TextWriter(engine, tmp_path, options)
    writer.write_shard()
    before = contents(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            writer.write_shard()
    assert caught.value.filename == str(shard_path(tmp_path, 1))
    assert contents(tmp_path) == before
    TextWriter(engine, tmp_path, options).write_shard()
    assert count_shards(tmp_path) == 2


def test_texts_are_told_of_before_there_is_a_file_of_them(engine: Engine, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    writer = TextWriter(engine, tmp_path, TextOptions(max_tokens=8, texts_per_shard=4))
    for _ in range(2):
        writer.write_shard(on_texts=lambda shard: told.append((shard.generated_tokens, count_shards(tmp_path))))
    assert told == [(read_shard(tmp_path, number).generated_tokens, number) for number in range(2)]


def test_a_failure_of_the_engine_ends_the_shard(engine: Engine, scripted: object, tmp_path: Path) -> None:
    scripted.fail_with = "out of pages"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of pages"):
        TextWriter(engine, tmp_path, TextOptions(texts_per_shard=4)).write_shard()
    assert count_shards(tmp_path) == 0


# --- files -------------------------------------------------------------------------------------------------------

texts = st.lists(
    st.builds(
        lambda ids, prompt, kind, end: Text(np.array(ids, np.int32), min(prompt, len(ids)), kind, end),
        st.lists(st.integers(0, 2**31 - 1), max_size=20),
        st.integers(0, 20),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(texts)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, written_texts: list[Text]) -> None:
    directory = tmp_path_factory.getbasetemp()
    write_shard(directory, 0, Shard.of(written_texts))
    first = shard_path(directory, 0).read_bytes()
    read = list(read_shard(directory, 0).texts())
    assert [text.token_ids.tolist() for text in read] == [text.token_ids.tolist() for text in written_texts]
    assert [(t.prompt_length, t.kind, t.end) for t in read] == [(t.prompt_length, t.kind, t.end) for t in written_texts]
    write_shard(directory, 0, Shard.of(written_texts))
    assert shard_path(directory, 0).read_bytes() == first


def test_a_damaged_shard_is_one_line(tmp_path: Path) -> None:
    text = Text(np.arange(500, dtype=np.int32), 3, 0, 0)
    write_shard(tmp_path, 0, Shard.of([text, text]))
    data = shard_path(tmp_path, 0).read_bytes()
    damaged = [b"", b"text", data[: len(data) // 2], data[:-1], data.replace(b"lengths", b"length_", 1)]
    for i in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[i] ^= 0x55
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        shard_path(tmp_path, 0).write_bytes(content)
        try:
            read_shard(tmp_path, 0)
        except TrainingError as error:
            refused += 1
            assert re.search(r"shard-000000\.npz is damaged .*--resume", str(error))
            assert "\n" not in str(error)
    assert refused > 30
