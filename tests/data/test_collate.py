"""Laws of a batch: packed equals apart, and nothing is learned across the border of two documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fake
import numpy as np
import pytest
import torch
from test_samples import made, write

from finetuner.config.data import Dialogues, Documents, Mix
from finetuner.data import collate as collate_module
from finetuner.data import packs as packs_module
from finetuner.data.batch import IGNORED, Batch
from finetuner.data.collate import collate
from finetuner.data.packs import Packs, pack_samples
from finetuner.data.samples import Samples, prepare

SPEC: Any = fake.FakeSpec()


def dialogues(folder: Path, **options: Any) -> Samples:
    data = Dialogues(write(folder / "a.jsonl", made(60, seed=2)), rows=fake.ask, length=100, **options)
    return prepare(data, SPEC, cache=folder / "cache")


def documents(folder: Path, length: int = 16) -> Samples:
    texts = [{"text": "abcdefghijklmnopqrstuvwxyz"[: 1 + n % 26] * (1 + n % 3)} for n in range(40)]
    return prepare(Documents(write(folder / "d.jsonl", texts), length=length), SPEC, cache=folder / "cache")


def parts(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, positions) of each document in the row."""
    cut = [
        torch.split(tensor[0], list(batch.lengths))
        for tensor in (batch.tokens_1T, batch.targets_1T, batch.positions_1T)
    ]
    return [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(*cut)]


def all_parts(samples: Samples, packs: Packs) -> list[tuple[int, tuple[list[int], list[int], list[int]]]]:
    batches = [collate(samples, packs, [number]) for number in range(len(packs))]
    assert [batch.learned for batch in batches] == packs.learned.tolist()
    assert all(int((batch.targets_1T != IGNORED).sum()) == batch.learned > 0 for batch in batches)
    assert all(sum(batch.lengths) == batch.tokens_1T.shape[1] <= samples.length for batch in batches)
    return [(row, part) for batch in batches for row, part in zip(batch.rows, parts(batch), strict=True)]


def check_dialogues(samples: Samples, packs: Packs) -> None:
    """Packed equals apart: every sample once, its tokens and targets as they are alone, positions from zero."""
    found = sorted(all_parts(samples, packs), key=lambda item: item[0])
    assert [row for row, _ in found] == list(range(len(samples)))
    for row, (tokens, targets, positions) in found:
        alone = samples[row]
        assert (tokens, targets) == (alone.tokens_T.tolist(), alone.targets_T.tolist())
        assert positions == list(range(len(tokens)))


@pytest.mark.parametrize("pack", [True, False])
def test_a_packed_dialogue_is_the_dialogue_alone(pack: bool, tmp_path: Path) -> None:
    samples = dialogues(tmp_path, pack=pack)
    packs = pack_samples(samples, seed=0)
    check_dialogues(samples, packs)
    assert packs.report.packs == len(packs)
    assert packs.report.tokens == int(samples.lengths.sum())
    assert packs.report.learned == int(samples.learned.sum())
    assert packs.report.fill == pytest.approx(packs.report.tokens / (len(packs) * 100))
    assert (len(packs) == len(samples)) is not pack


def check_documents(samples: Samples, packs: Packs) -> None:
    """Every token of every document once; each but a document's first is a target exactly once, where it follows."""
    tokens: dict[tuple[int, int], int] = {}
    targets: dict[tuple[int, int], int] = {}
    begun = dict(zip(range(len(packs.rows)), packs.starts.tolist()))
    for number, (row, part) in enumerate(all_parts(samples, packs)):
        start = begun[number] - int(samples.starts[row])
        assert part[2] == list(range(len(part[0])))
        for place, (token, target) in enumerate(zip(part[0], part[1])):
            assert tokens.setdefault((row, start + place), token) is token
            if target != IGNORED:
                assert (row, start + place + 1) not in targets
                targets[row, start + place + 1] = target
    alone = {(n, i): t for n in range(len(samples)) for i, t in enumerate(samples[n].tokens_T.tolist())}
    assert targets == {key: token for key, token in alone.items() if key[1] > 0}
    missing = alone.keys() - tokens.keys()
    assert all(alone[key] == tokens.get(key, alone[key]) for key in alone)
    assert len(missing) == packs.report.idle_tokens < samples.length
    assert packs.report.tokens + packs.report.idle_tokens == len(alone)


@pytest.mark.parametrize("length", [8, 9, 16, 31, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_running_documents_learn_every_token_once(length: int, seed: int, tmp_path: Path) -> None:
    samples = documents(tmp_path, length)
    packs = pack_samples(samples, seed=seed)
    check_documents(samples, packs)
    sizes = [sum(collate(samples, packs, [number]).lengths) for number in range(len(packs))]
    assert all(size == length for size in sizes[:-1])


def test_a_target_that_crosses_into_the_next_document_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: the token behind a document is lent as its last target, though it is another document's first."""
    samples = documents(tmp_path)
    packs = pack_samples(samples, seed=0)
    right = collate_module.collate

    def leaky(samples: Samples, packs: Packs, numbers: Any) -> Batch:
        longer = np.minimum(samples.stops + 1, samples.stops[-1])
        return replace(right(replace(samples, stops=longer), packs, numbers), learned=packs.learned[numbers[0]])

    monkeypatch.setitem(globals(), "collate", leaky)
    with pytest.raises(AssertionError):
        check_documents(samples, packs)


def test_a_border_that_forgets_the_next_token_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the last place of a piece has no target."""
    samples = documents(tmp_path)
    packs = pack_samples(samples, seed=0)
    right = collate_module.collate
    nowhere = replace(samples, stops=np.zeros_like(samples.stops))
    monkeypatch.setitem(globals(), "collate", lambda samples, packs, numbers: right(nowhere, packs, numbers))
    with pytest.raises(AssertionError):
        check_documents(samples, packs)


def test_the_last_token_alone_in_a_block_is_left_out_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a" * 16}])  # 17 tokens: two blocks of 8, and one token
    samples = prepare(Documents(source, length=8), SPEC, cache=tmp_path / "cache")
    packs = pack_samples(samples, seed=0)
    assert (len(packs), packs.report.idle_tokens, packs.report.learned) == (2, 1, 16)
    assert collate(samples, packs, [1]).targets_1T[0, -1] == 3


def mixed(folder: Path, pack: bool) -> Samples:
    source, texts = (
        write(folder / "a.jsonl", made(30)),
        write(folder / "d.jsonl", [{"text": "ab" * n} for n in range(1, 80)]),
    )
    parts = ((Dialogues(source, rows=fake.ask, length=90, pack=pack), 1.0), (Documents(texts, length=90), 1.0))
    return prepare(Mix(parts), SPEC, cache=folder / "cache")


@pytest.mark.parametrize("pack", [True, False])
def test_a_mix_of_dialogues_and_documents_learns_the_same(pack: bool, tmp_path: Path) -> None:
    samples = mixed(tmp_path, pack)
    packs = pack_samples(samples, seed=0)
    found = all_parts(samples, packs)
    for row, (tokens, targets, _) in found:
        if samples.whole[row]:
            alone = samples[row]
            assert (tokens, targets) == (alone.tokens_T.tolist(), alone.targets_T.tolist())
    assert sum(len(part[0]) for _, part in found) + packs.report.idle_tokens == int(samples.lengths.sum())
    assert packs.report.learned == int(samples.learned.sum())
    kinds = [{bool(samples.whole[row]) for row in collate(samples, packs, [n]).rows} for n in range(len(packs))]
    assert any(len(kind) == 2 for kind in kinds) is pack


def test_several_packs_make_a_longer_row(tmp_path: Path) -> None:
    samples = dialogues(tmp_path)
    packs = pack_samples(samples, seed=0)
    together, apart = collate(samples, packs, [3, 1]), [collate(samples, packs, [3]), collate(samples, packs, [1])]
    for name in ("tokens_1T", "targets_1T", "positions_1T"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(batch, name) for batch in apart], dim=1))
    assert together.lengths == apart[0].lengths + apart[1].lengths
    assert together.learned == apart[0].learned + apart[1].learned
    assert together.tokens_1T.dtype == together.targets_1T.dtype == together.positions_1T.dtype == torch.int64


def test_a_rank_without_packs_gets_a_token_that_teaches_nothing(tmp_path: Path) -> None:
    samples = dialogues(tmp_path)
    batch = collate(samples, pack_samples(samples, seed=0), ())
    assert (batch.lengths, batch.learned, batch.rows) == ((1,), 0, ())
    assert batch.targets_1T.tolist() == [[IGNORED]]
    assert batch.positions_1T.tolist() == [[0]]


def test_the_composition_of_packs_is_fixed_by_seed_lengths_and_length(tmp_path: Path) -> None:
    samples = dialogues(tmp_path)
    first, second = pack_samples(samples, seed=1), pack_samples(samples, seed=1)
    assert np.array_equal(first.rows, second.rows)
    assert not np.array_equal(first.rows, pack_samples(samples, seed=2).rows)
    assert packs_module.LOOK_AHEAD > 1000
