"""Laws of preparing: the same bytes however it is done, every row accounted for, no half of a cache ever used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake
import numpy as np
import pytest

from finetuner.config.data import Dialogues, Documents, Json, Mix, Skip
from finetuner.data import cache as cache_module
from finetuner.data import pool as pool_module
from finetuner.data import samples as samples_module
from finetuner.data import worker as worker_module
from finetuner.data.batch import IGNORED
from finetuner.data.report import Tally, write_report
from finetuner.data.samples import Samples, prepare
from finetuner.dialogue.rows import text
from finetuner.errors import DataError, Problem

SPEC: Any = fake.FakeSpec()


def write(path: Path, rows: list[Any]) -> Json:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Json(str(path))


def made(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"q": "q" * draw.randint(1, 20), "a": "a" * draw.randint(1, 60)} for _ in range(count)]


def digest(folder: Path) -> str:
    (stored,) = (path for path in folder.iterdir() if path.is_dir())
    files = sorted(path for path in stored.iterdir() if path.name != "MANIFEST.json")
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def error(data: Any, folder: Path) -> Any:
    with pytest.raises(DataError) as caught:
        prepare(data, SPEC, cache=folder / "cache")
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]
    return caught.value


def test_a_sample_is_the_rows_tokens_and_the_one_shift(tmp_path: Path) -> None:
    data = Dialogues(write(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}]), rows=fake.ask, length=8)
    samples = prepare(data, SPEC, cache=tmp_path / "cache")
    assert samples[0].tokens_T.tolist() == [1, 97, 98, 2, 1, 99, 2]
    assert samples[0].targets_T.tolist() == [IGNORED, IGNORED, IGNORED, IGNORED, 99, 2, IGNORED]
    assert samples.learned.tolist() == [2]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = made(90)
    rows[7], rows[50], rows[70] = "null", {"q": "x"}, {"q": "!", "a": "y"}
    data = Dialogues(
        write(tmp_path / "a.jsonl", rows), rows=fake.ask, length=60, too_long="truncate", on_bad_row=Skip(3)
    )
    digests = {}
    for workers, chunk in ((1, 512), (1, 7), (2, 7), (3, 5)):
        monkeypatch.setattr(cache_module, "CHUNK", chunk)
        monkeypatch.setattr(pool_module, "FEW", 2)
        seen: list[int] = []
        folder = tmp_path / f"cache{workers}{chunk}"
        prepare(data, SPEC, cache=folder, workers=workers, progress=lambda rows, _: seen.append(rows))  # noqa: B023
        digests[workers, chunk] = digest(folder)
        assert seen[-1] == 90
        assert seen == sorted(seen)
    assert len(set(digests.values())) == 1


def test_workers_that_answer_out_of_order_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the law above."""
    data = Dialogues(write(tmp_path / "a.jsonl", made(90)), rows=fake.ask, length=100)
    prepare(data, SPEC, cache=tmp_path / "right")
    parts = cache_module.parts_of
    monkeypatch.setattr(cache_module, "CHUNK", 7)
    monkeypatch.setattr(cache_module, "parts_of", lambda *args: reversed(list(parts(*args))))
    prepare(data, SPEC, cache=tmp_path / "wrong")
    assert digest(tmp_path / "right") != digest(tmp_path / "wrong")


def test_workers_import_no_torch() -> None:
    code = "import sys; import finetuner.data.worker; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr


# The report


def test_the_report_is_exact(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"q": "ab", "a": "c"},  # 7 tokens, 2 learned
        {"q": "?<<", "a": "??"},  # 9 tokens, 3 learned, 3 blocks of thinking, 1 row with control strings
        "null",
        '{"a": NaN}',
        {"q": "x"},  # no answer
        {"q": "x", "a": "!"},  # the encoder refuses
        {"q": "x", "a": 5},  # the row function raises
        {"q": "{{name}}", "a": "b"},
        {"q": "a" * 4, "a": "b" * 9},  # 17 tokens, cut to 12: 5 of 10 learned are left
        {"q": "a" * 20, "a": "b"},  # 25 tokens: nothing learned is left of it
    ]
    rows += [{"q": "ab", "a": "c"}] * 27
    data = Dialogues(
        write(tmp_path / "a.jsonl", rows), rows=fake.ask, length=12, too_long="truncate", on_bad_row=Skip(6)
    )
    report = prepare(data, SPEC, cache=tmp_path / "cache").report
    places = {n: f"{tmp_path}/a.jsonl:{n}" for n in range(1, 40)}
    dropped = {
        kind: {"rows": 1, "samples": 0, "places": [places[line]]}
        for kind, line in (
            ("null-row", 3), ("not-finite", 4), ("missing-field", 5), ("control", 6), ("row-function", 7),
            ("placeholder", 8),
        )
    }  # fmt: skip
    dropped["no-target-after-truncation"] = {"rows": 1, "samples": 1, "places": [places[10]]}
    wanted = {
        "rows_in": 37,
        "rows_kept": 30,
        "samples": 30,
        "truncated": 1,
        "tokens_in": 28 * 7 + 9 + 17 + 25,
        "tokens_kept": 28 * 7 + 9 + 12,
        "tokens_learned": 28 * 2 + 3 + 5,
        "tokens_lost": 5 + 25,
        "think_dropped": 3,
        "control_rows": 1,
        "longest": 25,
        "dropped": dropped,
    }
    assert {name: report[name] for name in wanted} == wanted
    content = (tmp_path / "a.jsonl").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert report["files"] == [{"name": f"{tmp_path}/a.jsonl", "size": len(content), "sha256": sha256}]
    path = write_report(report, tmp_path / "run")
    assert json.loads(path.read_text()) == report
    assert [item.name for item in path.parent.iterdir()] == ["data_report.json"]


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("turns", ["all", "split"])
def test_every_row_and_token_is_accounted_for(too_long: Any, turns: Any, tmp_path: Path) -> None:
    rows: list[Any] = made(300, seed=1)
    for line in range(0, 300, 11):
        rows[line] = ["null", '{"q"', '{"q": 1}'][line % 3]
    source = write(tmp_path / "a.jsonl", rows)
    data = Dialogues(source, rows=fake.ask, length=50, too_long=too_long, turns=turns, on_bad_row=Skip(28))
    samples = prepare(data, SPEC, cache=tmp_path / "cache")
    report = samples.report
    assert report["rows_in"] == 300
    assert report["rows_in"] == report["rows_kept"] + sum(loss["rows"] for loss in report["dropped"].values())
    assert report["tokens_in"] == report["tokens_kept"] + report["tokens_lost"]
    assert report["tokens_kept"] == int(samples.lengths.sum())
    assert report["tokens_learned"] == int(samples.learned.sum())
    targets = [int((samples[number].targets_T != IGNORED).sum()) for number in range(len(samples))]
    assert targets == samples.learned.tolist()
    assert min(targets) > 0
    assert len(samples) == report["samples"]


def test_a_sample_that_vanishes_uncounted_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the law above: what is dropped is not counted."""
    monkeypatch.setattr(Tally, "lose", lambda *_: None)
    with pytest.raises(AssertionError):
        test_every_row_and_token_is_accounted_for("drop", "all", tmp_path)


# What is refused


def test_several_bad_rows_are_told_at_once_and_all_are_counted(tmp_path: Path) -> None:
    rows: list[Any] = made(700)
    for line in range(0, 700, 2):
        rows[line] = "null"
    rows[5] = {"q": "no answer"}
    problems = error(Dialogues(write(tmp_path / "a.jsonl", rows), rows=fake.ask), tmp_path).problems
    assert [problem.code for problem in problems] == ["E-ROW-NULL-ROW", "E-ROW-MISSING-FIELD", "E-DATA-ROWS"]
    assert [line.split()[0].rpartition(":")[2] for line in problems[0].where.split("\n")] == [
        str(line) for line in range(1, 39, 2)
    ]
    assert problems[1].where == f"{tmp_path}/a.jsonl:6"
    assert problems[-1].found == "351 of 700 rows: null-row 350, missing-field 1"
    assert "Skip(351)" in problems[-1].remedy


def test_skip_leaves_out_as_many_as_it_says_and_no_more(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*made(10), "null", "5"])
    assert len(prepare(Dialogues(source, rows=fake.ask, on_bad_row=Skip(2)), SPEC, cache=tmp_path / "right")) == 10
    problem = error(Dialogues(source, rows=fake.ask, on_bad_row=Skip(1)), tmp_path).problems[-1]
    assert problem.code == "E-DATA-SKIP-LIMIT"


def test_too_long_samples_are_told_with_the_length_that_fits(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "a" * n, "a": "b"} for n in (1, 40, 20, 1)])
    (problem,) = error(Dialogues(source, rows=fake.ask, length=20), tmp_path).problems
    assert problem.code == "E-DATA-TOO-LONG"
    assert problem.where == f"{tmp_path}/a.jsonl:2, {tmp_path}/a.jsonl:3"
    assert problem.found == "2 of 4 samples; the longest has 45 tokens"
    assert "length=45" in problem.fits
    fitting = Dialogues(source, rows=fake.ask, length=45)
    assert len(prepare(fitting, SPEC, cache=tmp_path / "fits")) == 4


@pytest.mark.parametrize(("long", "code"), [(1, None), (2, "E-DATA-NO-TARGETS"), (20, "E-DATA-NO-TARGETS")])
def test_more_than_a_twentieth_without_targets_is_refused(long: int, code: str | None, tmp_path: Path) -> None:
    rows = [{"q": "a" * 90, "a": "b"}] * long + [{"q": "a", "a": "b"}] * (20 - long)
    data = Dialogues(write(tmp_path / "a.jsonl", rows), rows=fake.ask, length=16, too_long="truncate")
    if code is None:
        assert len(prepare(data, SPEC, cache=tmp_path / "cache")) == 20 - long
    else:
        assert error(data, tmp_path).problems[0].code == code


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "a" * 90, "a": "b"}] * 3)
    problem = error(Dialogues(source, rows=fake.ask, length=16, too_long="drop"), tmp_path).problems[0]
    assert (problem.code, problem.found) == ("E-DATA-EMPTY", "3 rows; dropped: too-long 3")
    source = write(tmp_path / "b.jsonl", ["null"] * 3)
    data = Dialogues(source, rows=fake.ask, on_bad_row=Skip(3))
    assert error(data, tmp_path).problems[0].code == "E-DATA-EMPTY"


def test_a_placeholder_is_replaced_or_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "who?", "a": "I am {{name}} by {{ author }}"}])
    assert error(Dialogues(source, rows=fake.ask), tmp_path).problems[0].code == "E-ROW-PLACEHOLDER"
    half = Dialogues(source, rows=fake.ask, replace=(("{{name}}", "Ada"),))
    assert error(half, tmp_path).problems[0].found == "{{ author }}"
    both = (("{{name}}", "Ada"), ("{{ author }}", "us"))
    samples = prepare(Dialogues(source, rows=fake.ask, replace=both), SPEC, cache=tmp_path / "both")
    assert "".join(map(chr, samples[0].tokens_T)).endswith("I am Ada by us\x02")
    kept = (("{{name}}", "{{name}}"), ("{{ author }}", "us"))
    samples = prepare(Dialogues(source, rows=fake.ask, replace=kept), SPEC, cache=tmp_path / "kept")
    assert "I am {{name}} by us" in "".join(map(chr, samples[0].tokens_T))
    texts = write(tmp_path / "b.jsonl", [{"text": "a {{name}} in a template"}])
    assert len(prepare(Documents(texts, rows=text), SPEC, cache=tmp_path / "texts")) == 1


def test_documents_are_made_of_texts(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}])
    assert error(Documents(source, rows=fake.ask), tmp_path).problems[0].code == "E-ROW-NOT-DOCUMENT"


def test_a_row_without_anything_to_learn_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.Message, "is_learned", property(lambda self: False))
    source = write(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}])
    assert error(Dialogues(source, rows=fake.ask), tmp_path).problems[0].code == "E-ROW-NO-TARGET"


# The cache


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each building of a cache."""
    built: list[int] = []
    write_samples = samples_module.write_samples

    def counted(*args: Any) -> Tally:
        built.append(1)
        return write_samples(*args)

    monkeypatch.setattr(samples_module, "write_samples", counted)
    return built


def same(left: Samples, right: Samples) -> bool:
    return all(
        np.array_equal(left[n].tokens_T, right[n].tokens_T) and np.array_equal(left[n].targets_T, right[n].targets_T)
        for n in range(max(len(left), len(right)))
    )


def test_samples_are_made_once_and_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = counting(monkeypatch)
    data = Dialogues(write(tmp_path / "a.jsonl", made(20)), rows=fake.ask)
    first, second = (prepare(data, SPEC, cache=tmp_path / "cache") for _ in range(2))
    assert len(built) == 1
    assert same(first, second)
    assert isinstance(second.streams[0], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.streams[0][0] = 1


@pytest.mark.parametrize(
    "name", ["tokens.bin", "offsets.bin", "learned.bin", "rows.bin", "report.json", "MANIFEST.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_made_again_and_told(
    name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, told = counting(monkeypatch), []
    monkeypatch.setattr(samples_module, "warn", told.append)
    data = Dialogues(write(tmp_path / "a.jsonl", made(20)), rows=fake.ask)
    first = [
        sample.tokens_T.tolist() for sample in map(prepare(data, SPEC, cache=tmp_path / "cache").__getitem__, range(20))
    ]
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    if damage == "gone":
        (folder / name).unlink()
    else:
        os.truncate(folder / name, (folder / name).stat().st_size - 1)
    again = prepare(data, SPEC, cache=tmp_path / "cache")
    assert [again[n].tokens_T.tolist() for n in range(20)] == first
    assert (len(built), len(told)) == (2, 1)
    assert name in told[0]


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import fake
from finetuner.config.data import Dialogues, Json
from finetuner.data import cache, samples
cache.CHUNK = 10
def tick(rows, total):
    if rows >= {rows}:
        os.kill(os.getpid(), 9)
samples.prepare(Dialogues(Json({file!r}), rows=fake.ask), fake.FakeSpec(), cache=Path({cache!r}), progress=tick)
print("done")
"""


def test_half_a_cache_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dialogues(write(tmp_path / "a.jsonl", made(100)), rows=fake.ask)
    values = {"tests": str(Path(__file__).parent), "root": str(Path(__file__).parents[2]), "file": data.source.files}
    for point, rows in (("", 50), ("", 100), ("rename:1", 10**9), ("fsync:2", 10**9)):
        code = KILLED.format(rows=rows, cache=str(tmp_path / "cache"), **values)
        environment = os.environ | ({"FINETUNER_FAULT": point} if point else {})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode in (-signal.SIGKILL, 137), done.stderr
        assert not [path for path in (tmp_path / "cache").iterdir() if re.fullmatch("[0-9a-f]+", path.name)]
        assert [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".tmp_")]
    built = counting(monkeypatch)
    assert len(prepare(data, SPEC, cache=tmp_path / "cache")) == 100
    assert len(built) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def _prepare_slowly(data: Dialogues, folder: Path, queue: Any) -> None:
    def tick(rows: int, total: int | None) -> None:
        time.sleep(0.3)
        queue.put("built")

    queue.put(int(prepare(data, SPEC, cache=folder, progress=tick).lengths.sum()))


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    data = Dialogues(write(tmp_path / "a.jsonl", made(20)), rows=fake.ask)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_prepare_slowly, args=(data, tmp_path / "cache", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    told = [queue.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join()
    assert told.count("built") == 1
    assert len({item for item in told if item != "built"}) == 1


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    data = Dialogues(write(tmp_path / "a.jsonl", made(20)), rows=fake.ask)
    with pytest.raises(DataError, match="E-DATA-CHANGED"):
        prepare(data, SPEC, cache=tmp_path / "cache", progress=lambda *_: write(tmp_path / "a.jsonl", made(21)))


@pytest.mark.parametrize("kind", ["at the start", "at a row", "killed"])
def test_a_dead_worker_is_told_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the chunks are that lie in its pipe."""
    monkeypatch.setattr(cache_module, "CHUNK", 50)
    rows = [{"q": "x" * 5000, "a": "y"}] * 1000
    data = Dialogues(write(tmp_path / "a.jsonl", rows), rows=fake.ask, length=10_000)
    with pytest.raises(DataError, match="E-DATA-WORKER") as caught:
        prepare(data, Deadly(template=kind), cache=tmp_path / "cache", workers=2)
    assert caught.value.problems[0].found == ("exit code -9" if kind == "killed" else "exit code 1")


def test_what_a_worker_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", 2)
    data = Dialogues(write(tmp_path / "a.jsonl", made(20)), rows=fake.ask)
    with pytest.raises(DataError, match="E-SAID"):
        prepare(data, Deadly(template="says why"), cache=tmp_path / "cache", workers=2)


class Deadly(fake.FakeSpec):
    """Ends its worker in the way that its template says."""

    def build(self) -> Any:
        match self.template:
            case "at the start":
                os._exit(1)
            case "says why":
                raise DataError(Problem("E-SAID", "so it is"))
        encoder = super().build()
        encoder.encode = lambda items: os.kill(os.getpid(), 9) if self.template == "killed" else os._exit(1)
        return encoder


# Parts of samples


def test_a_held_out_split_depends_on_the_seed_and_the_number_of_rows_alone(tmp_path: Path) -> None:
    splits = []
    for seed_of_data, length in ((0, 100), (1, 200)):
        source = write(tmp_path / f"{seed_of_data}.jsonl", made(50, seed_of_data))
        samples = prepare(Dialogues(source, rows=fake.ask, length=length), SPEC, cache=tmp_path / "cache")
        train, held = samples.hold_out(0.1, seed=3)
        assert sorted([*train.origins, *held.origins]) == list(range(50))
        assert len(held) == 5
        splits.append(held.origins.tolist())
        assert samples.hold_out(0.1, seed=4)[1].origins.tolist() != splits[-1]
    assert splits[0] == splits[1]


def test_samples_of_one_row_are_not_torn_apart_by_the_split(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", made(30))
    samples = prepare(Dialogues(source, rows=fake.ask, turns="split"), SPEC, cache=tmp_path / "cache")
    train, held = samples.hold_out(0.2, seed=0)
    assert (len(samples), len(held)) == (60, 12)
    assert not set(train.origins.tolist()) & set(held.origins.tolist())


def test_one_row_cannot_be_held_out(tmp_path: Path) -> None:
    samples = prepare(Dialogues(write(tmp_path / "a.jsonl", made(1)), rows=fake.ask), SPEC, cache=tmp_path / "cache")
    with pytest.raises(DataError, match="E-DATA-HOLD-OUT"):
        samples.hold_out(0.5, seed=0)
    two = prepare(Dialogues(write(tmp_path / "b.jsonl", made(2)), rows=fake.ask), SPEC, cache=tmp_path / "cache")
    assert [len(part) for part in two.hold_out(0.999, seed=0)] == [1, 1]


def test_a_mix_gives_each_part_its_share(tmp_path: Path) -> None:
    few = Dialogues(write(tmp_path / "few.jsonl", [{"q": "a", "a": "b" * n} for n in range(1, 11)]), rows=fake.ask)
    many = Dialogues(write(tmp_path / "many.jsonl", [{"q": "c", "a": "d" * n} for n in range(1, 31)]), rows=fake.ask)
    mix = Mix(((few, 3.0), (many, 1.0)))
    samples = prepare(mix, SPEC, cache=tmp_path / "cache", seed=5)
    first = ["".join(map(chr, samples[n].tokens_T[4:-1].tolist())) for n in range(len(samples))]
    assert len(samples) == 40
    given = [text.strip("\x01") for text in first]
    assert sum("b" in text for text in given) == 30
    assert all(given.count("b" * n) == 3 for n in range(1, 11))
    assert all(given.count("d" * n) <= 1 for n in range(1, 31))
    assert samples.report["parts"][0]["samples_given"] == 30
    again = prepare(mix, SPEC, cache=tmp_path / "cache", seed=5)
    assert np.array_equal(again.starts, samples.starts)
    other = prepare(mix, SPEC, cache=tmp_path / "cache", seed=6)
    assert not np.array_equal(other.starts, samples.starts)
    targets = [int((samples[n].targets_T != IGNORED).sum()) for n in range(40)]
    assert targets == samples.learned.tolist()


def test_the_worker_module_knows_the_same_name_as_the_report() -> None:
    assert worker_module.NO_TARGETS == "no-target-after-truncation"
