"""Laws of reading rows: every row has its place, every wrong one is told, and memory is flat."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetuner.errors import DataError, UsageError
from finetuner.runtime import files, json_rows, json_value, json_window, lock, table_rows
from finetuner.runtime.files import BadRow, find_files, read_rows

GOOD = '{"a": 1}'


def rows(path: Path, content: str | bytes = b"", reader: files.Reader = json_rows.json_rows) -> list[Any]:
    if content:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path, reader))


def refusal(path: Path, content: str | bytes, reader: files.Reader = json_rows.json_rows) -> tuple[str, str]:
    """(code, place) of the error that reading raises."""
    with pytest.raises(DataError) as caught:
        rows(path, content, reader)
    problem = caught.value.problems[0]
    return problem.code, problem.where.removeprefix(str(path))


# Line 2 of three; the first and the third are good.
BAD_LINES: dict[str, tuple[bytes, str, str]] = {
    "null": (b"null", "null-row", ":2"),
    "number": (b"5", "not-an-object", ":2"),
    "float": (b"1.5", "not-an-object", ":2"),
    "text": (b'"x"', "not-an-object", ":2"),
    "truth": (b"true", "not-an-object", ":2"),
    "array": (b"[1, 2]", "not-an-object", ":2"),
    "array of objects": (b'[{"a": 1}]', "not-an-object", ":2"),
    "word": (b"hello", "json", ":2:1"),
    "single quotes": (b"{'a': 1}", "json", ":2:2"),
    "no quotes": (b"{a: 1}", "json", ":2:2"),
    "missing comma": (b'{"a": 1 "b": 2}', "json", ":2:9"),
    "missing colon": (b'{"a" 1}', "json", ":2:6"),
    "trailing comma": (b'{"a": 1,}', "json", ":2:9"),
    "comma after the row": (b'{"a": 1},', "json", ":2:9"),
    "cut object": (b'{"a": 1', "json", ":2:8"),
    "cut text": (b'{"a": "b', "json", ":2:7"),
    "two rows": (b'{"a": 1}{"a": 2}', "two-rows", ":2:9"),
    "two rows apart": (b'{"a": 1} {"a": 2}', "two-rows", ":2:10"),
    "comment line": (b"// a comment", "json", ":2:1"),
    "comment within": (b'{"a": 1, /* one */ "b": 2}', "json", ":2:10"),
    "hash comment": (b"# a comment", "json", ":2:1"),
    "comment behind": (b'{"a": 1} // one', "json", ":2:10"),
    "NaN": (b'{"a": NaN}', "not-finite", ":2"),
    "Infinity": (b'{"a": Infinity}', "not-finite", ":2"),
    "-Infinity": (b'{"a": [-Infinity]}', "not-finite", ":2"),
    "latin-1": (b'{"a": "caf\xe9"}', "utf-8", ":2"),
    "utf-16 half": (b'{"a": "\xed\xa0\x80"}', "utf-8", ":2"),
    "lone surrogate": (b'{"a": "\\ud800"}', "surrogate", ":2"),
    "surrogates swapped": (b'{"a": "\\udc00\\ud800"}', "surrogate", ":2"),
    "surrogate in a key": (b'{"\\ud800": 1}', "surrogate", ":2"),
    "NUL escape": (b'{"a": ["\\u0000"]}', "nul", ":2"),
    "NUL byte": (b'{"a": "\x00"}', "json", ":2:8"),
    "control character": (b'{"a": "\x01"}', "json", ":2:8"),
    "raw tab": (b'{"a": "\t"}', "json", ":2:8"),
    "deep": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "depth", ":2"),
    "very deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "depth", ":2"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "json", ":2"),
    "html": (b"<html><body>404</body></html>", "json", ":2:1"),
    "python": (b'{"a": None}', "json", ":2:7"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_wrong_line_is_one_bad_row_and_reading_goes_on(name: str, tmp_path: Path) -> None:
    content, kind, place = BAD_LINES[name]
    first, bad, last = rows(tmp_path / "a.jsonl", GOOD.encode() + b"\n" + content + b"\n" + GOOD.encode())
    assert first == (f"{tmp_path}/a.jsonl:1", {"a": 1})
    assert last == (f"{tmp_path}/a.jsonl:3", {"a": 1})
    assert isinstance(bad, BadRow)
    assert (bad.kind, bad.place) == (kind, f"{tmp_path}/a.jsonl{place}")
    assert bad.reason
    assert len(bad.found) < 100


@pytest.mark.parametrize("name", [name for name, (_, kind, _) in BAD_LINES.items() if kind != "json"])
def test_a_wrong_first_line_is_told_too(name: str, tmp_path: Path) -> None:
    content, kind, _ = BAD_LINES[name]
    bad, *good = rows(tmp_path / "a.jsonl", content + b"\n" + GOOD.encode() + b"\n" + GOOD.encode())
    assert (bad.kind, len(good)) == (kind, 2)


def test_a_truncated_download_is_told_at_its_last_line(tmp_path: Path) -> None:
    for end in range(1, len('{"a": "bcd"}')):
        *good, bad = rows(tmp_path / "a.jsonl", '{"a": "bcd"}\n' * 3 + '{"a": "bcd"}'[:end])
        assert (len(good), bad.kind, bad.place) == (3, "cut", f"{tmp_path}/a.jsonl:4")


def test_a_refused_constant_is_what_keeps_nan_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the NaN law: with the standard library's decoder the check above would be red."""
    monkeypatch.setattr(json_rows, "STRICT", json_value.LAX)
    (found,) = rows(tmp_path / "a.jsonl", '{"a": NaN}')
    assert not isinstance(found, BadRow)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("form", ["array", "objects"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz"])
def test_every_layout_gives_the_same_rows(
    form: str, indent: int | None, bom: bytes, ending: str, suffix: str, tmp_path: Path
) -> None:
    wanted = [{"n": n, "text": 'ä😀 \n " ] }', "list": [{"deep": None}, 1.5, []]} for n in range(7)]
    if form == "array":
        content = json.dumps(wanted, indent=indent)
    else:
        content = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in wanted) + "\n"
    data = bom + content.replace("\n", ending).encode()
    found = rows(tmp_path / f"a.{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    assert [row for _, row in found] == wanted


def test_the_place_is_the_line_where_the_row_begins(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.json", '\n[\n  {"a": 1,\n   "b": 2},\n\n  {"a": 3}, {"a": 4}]\n')
    assert [place.removeprefix(str(tmp_path)) for place, _ in found] == [
        "/a.json:3",
        "/a.json:6",
        "/a.json:6 (row 3)",
    ]
    found = rows(tmp_path / "a.json", '{"a":\n 1}\n\n{"a": 2}\n{\n"a": 3}')
    assert [place.rsplit(":")[-1] for place, _ in found] == ["1", "4", "5"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_blocks_may_end_anywhere(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [{"n": -1.5e10, "t": True, "é😀": ["\\", '"', "\u2028", None, False]} for _ in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(wanted, ensure_ascii=block % 2 == 0))
    monkeypatch.setattr(json_window, "BLOCK", block)
    with (tmp_path / "a.json").open("rb") as file:
        window = json_window.Window("a.json", file)
        assert [row for _, row in json_rows._array("a.json", window)] == wanted


STREAMS = {
    "cut in a row": ('[{"a": 1},\n{"a": "b', "E-DATA-CUT", ":2:1"),
    "cut between rows": ('[{"a": 1},\n{"a": 2}\n', "E-DATA-CUT", ":3:1"),
    "cut behind a comma": ('[{"a": 1},\n', "E-DATA-CUT", ":2:1"),
    "missing comma": ('[{"a": 1}\n {"a": 2}]', "E-DATA-JSON", ":2:2"),
    "trailing comma": ('[{"a": 1},\n]', "E-DATA-JSON", ":2:1"),
    "missing comma within": ('[\n {"a": 1\n  "b": 2}]', "E-DATA-JSON", ":3:3"),
    "comment": ('[\n // one\n {"a": 1}]', "E-DATA-JSON", ":2:2"),
    "comment within": ('[\n {"a": 1, // one\n "b": 2}]', "E-DATA-JSON", ":2:11"),
    "two arrays": ('[{"a": 1}]\n[{"a": 1}]', None, ""),
    "text behind": ('[\n{"a": 1}]\nthe end', "E-DATA-JSON", ":3:1"),
    "not UTF-8": (b'[\n{"a": 1},\n{"a": "\xe9"}]', "E-DATA-UTF8", ":3"),
    "indented, malformed": ('{\n "a": 1\n}\n{\n "a" 2\n}', "E-DATA-JSON", ":5:6"),
    "indented, cut": ('{\n "a": 1\n}\n{\n "a": ', "E-DATA-CUT", ":4:1"),
    "deep": ("[" * 100_000 + "]" * 100_000, "E-DATA-DEPTH", ":1:2"),
}


@pytest.mark.parametrize("name", [name for name, case in STREAMS.items() if case[1]])
def test_a_broken_array_is_refused_at_its_place(name: str, tmp_path: Path) -> None:
    content, code, place = STREAMS[name]
    assert refusal(tmp_path / "a.json", content) == (code, place)


def test_unusable_rows_of_an_array_are_bad_rows(tmp_path: Path) -> None:
    content = '[\n{"a": 1},\nnull,\n{"a": NaN, "b": [1, {"c": 2}]},\n12,\n{"a": "\\ud800"},\n{"a": 2}\n]'
    found = rows(tmp_path / "a.json", content)
    assert [item.kind if isinstance(item, BadRow) else item[1] for item in found] == [
        {"a": 1}, "null-row", "not-finite", "not-an-object", "surrogate", {"a": 2},
    ]  # fmt: skip


def test_a_row_of_too_many_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MOST", 5000)
    monkeypatch.setattr(json_window, "MOST", 5000)
    monkeypatch.setattr(json_window, "BLOCK", 512)
    large = json.dumps({"a": "x" * 6000})
    first, bad, last = rows(tmp_path / "a.jsonl", f"{GOOD}\n{large}\n{GOOD}\n")
    assert (bad.kind, bad.place) == ("size", f"{tmp_path}/a.jsonl:2")
    assert first[1] == last[1] == {"a": 1}
    first, bad, last = rows(tmp_path / "a.json", f"[{GOOD},\n{large},\n{GOOD}]")
    assert (bad.kind, bad.place, last[1]) == ("size", f"{tmp_path}/a.json:2", {"a": 1})
    endless = '{"a": "' + "x" * 20_000
    assert refusal(tmp_path / "a.json", f"[{GOOD},\n{endless}") == ("E-DATA-SIZE", ":2:1")


@pytest.mark.parametrize("form", ["array", "lines", "objects"])
def test_memory_does_not_grow_with_the_rows(form: str, tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 2000}, indent=1 if form == "objects" else None)
    peaks = []
    for count in (2000, 8000):
        joined = (",\n" if form == "array" else "\n").join([row] * count)
        (tmp_path / "a.json").write_text(f"[{joined}]" if form == "array" else joined)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(tmp_path / "a.json", json_rows.json_rows)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 8_000_000


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"[]", b"[ \n]"])
def test_an_empty_file_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert refusal(tmp_path / "a.jsonl", b"")[0] == "E-DATA-EMPTY"


KINDS = {
    "parquet": (b"PAR1\x15\x04", "E-DATA-KIND", "Parquet"),
    "zip": (b"PK\x03\x04....", "E-DATA-KIND", "zip"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "E-DATA-KIND", "UTF-16"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "E-DATA-KIND", "LFS"),
    "cut gzip": (gzip.compress(b'{"a": 1}\n' * 999)[:-20], "E-DATA-GZIP", "end-of-stream"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_told_whatever_its_name(name: str, tmp_path: Path) -> None:
    content, code, found = KINDS[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=found) as caught:
        rows(tmp_path / "a.json")
    assert caught.value.problems[0].code == code


# Finding files


def test_files_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl", "c.txt", ".d.json", "sub/e.json", ".git/f.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    names = lambda found: [str(path.relative_to(tmp_path)) for path in found]  # noqa: E731
    assert names(find_files(str(tmp_path), (".json", ".jsonl"))) == ["a.jsonl", "b.json", "sub/e.json"]
    assert names(find_files(f"{tmp_path}/*.json*", (".json",))) == ["a.jsonl", "b.json"]
    assert names(find_files(f"{tmp_path}/**/*.json", (".json",))) == ["b.json", "sub/e.json"]
    assert names(find_files([f"{tmp_path}/c.txt", f"{tmp_path}/b.json"], (".json",))) == ["c.txt", "b.json"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.json").write_text(GOOD)
    assert len(find_files(f"{tmp_path}/a[1]*.json", (".json",))) == 1


def finding(name: str | list[str]) -> Any:
    with pytest.raises(DataError) as caught:
        find_files(name, (".json",))
    return caught.value.problems[0]


def test_what_is_missing_is_told_with_what_stands_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(GOOD)
    problem = finding(f"{tmp_path}/tran.json")
    assert problem.code == "E-DATA-MISSING"
    assert f"did you mean {tmp_path}/train.json?" in problem.remedy
    problem = finding(f"{tmp_path}/no/such/folder/x.json")
    assert problem.code == "E-DATA-MISSING"
    assert "train.json" in problem.fits
    assert finding(f"{tmp_path}/*.csv").code == "E-DATA-MISSING"
    (tmp_path / "sub").mkdir()
    assert (finding(f"{tmp_path}/sub").code, finding(f"{tmp_path}/sub").found) == ("E-DATA-MISSING", "an empty folder")
    (tmp_path / "sub" / "a.csv").write_text("a")
    assert "a.csv" in finding(f"{tmp_path}/sub").found


def test_loops_devices_and_doubles_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    assert finding(f"{tmp_path}/a.json").code == "E-DATA-LOOP"
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "c.json").write_text(GOOD)
    os.remove(tmp_path / "a.json"), os.remove(tmp_path / "b.json")
    assert len(find_files(str(tmp_path), (".json",))) == 1
    (tmp_path / "dangling.json").symlink_to(tmp_path / "gone.json")
    assert finding(f"{tmp_path}/dangling.json").code == "E-DATA-MISSING"
    os.mkfifo(tmp_path / "pipe.json")
    assert finding(f"{tmp_path}/pipe.json").code == "E-DATA-KIND"
    assert finding([f"{tmp_path}/c.json", f"{tmp_path}/c*.json"]).code == "E-DATA-TWICE"


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.json").write_text(GOOD)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="E-DATA-PERMISSION"):
        list(read_rows(tmp_path / "a.json", json_rows.json_rows))


# Tables and texts


def test_csv_rows_bear_their_line_and_wrong_ones_are_told(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfq,a\r\n1,"x, ""y""\nz"\r\n\r\nonly\r\n2,b,c\r\n3,caf\xe9\r\n4,"a"b\r\n5,\x00\r\n6,ok\r\n'
    found = rows(tmp_path / "a.csv", content, partial(table_rows.csv_rows, delimiter=","))
    short = [(i.place[-1], i.kind) if isinstance(i, BadRow) else (i[0].rsplit(":")[-1], i[1]) for i in found]
    assert short == [
        ("2", {"q": "1", "a": 'x, "y"\nz'}),
        ("5", "columns"),
        ("6", "columns"),
        ("7", "utf-8"),
        ("8", "csv"),
        ("9", "nul"),
        ("10", {"q": "6", "a": "ok"}),
    ]


@pytest.mark.parametrize("header", ["a,a\n1,2\n", "a,\n1,2\n"])
def test_a_csv_header_names_each_column_once(header: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.csv", header, partial(table_rows.csv_rows, delimiter=",")) == (
        "E-DATA-CSV-HEADER",
        ":1",
    )


def test_an_open_quote_at_the_end_of_a_csv_is_told(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.csv", 'a,b\n1,"2\n', partial(table_rows.csv_rows, delimiter=","))
    assert [item.kind for item in found] == ["csv"]


def test_texts_are_lines_or_files(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfone \r\n\n \nt\xc3\xa4o\nb\xe4d\nn\x00l\n"
    found = rows(tmp_path / "a.txt", content, partial(table_rows.text_rows, whole=False))
    assert [item.kind if isinstance(item, BadRow) else item[1]["text"] for item in found] == [
        "one ",
        "täo",
        "utf-8",
        "nul",
    ]
    ((place, row),) = rows(tmp_path / "a.txt", "one\n\ntwo\n", partial(table_rows.text_rows, whole=True))
    assert (place, row) == (f"{tmp_path}/a.txt:1", {"text": "one\n\ntwo"})


def test_parquet_rows_keep_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [{"a": None, "b": [{"c": "x"}]}, {"a": 1, "b": None}]
    pq.write_table(pa.Table.from_pylist(wanted), tmp_path / "a.parquet")
    found = list(table_rows.parquet_rows(tmp_path / "a.parquet"))
    assert found == [(f"{tmp_path}/a.parquet:row {n}", row) for n, row in enumerate(wanted, 1)]
    (tmp_path / "b.parquet").write_text('{"a": 1}')
    with pytest.raises(DataError, match="E-DATA-KIND"):
        list(table_rows.parquet_rows(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match="E-DATA-MISSING"):
        list(table_rows.parquet_rows(tmp_path / "c.parquet"))


# Lock


def test_a_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = (
        "import sys, time; from pathlib import Path; from finetuner.runtime.lock import lock\n"
        f"with lock(Path({str(path)!r}), wait=False): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {other.pid}"), lock.lock(path, wait=False):
            pass
    finally:
        other.kill()
        other.wait()
    with lock.lock(path, wait=False):
        pass


def test_reading_files_imports_nothing_heavy() -> None:
    code = (
        "import sys; import finetuner.runtime.files, finetuner.runtime.json_rows, finetuner.runtime.table_rows, "
        "finetuner.runtime.lock; print({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
