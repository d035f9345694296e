"""Laws of sources: each kind gives its rows, and a hub data set that is not there is told without the network."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from finetuner.config.data import Csv, Hub, Json, Parquet, Text
from finetuner.data.source import files_of, load_hub, rows_of
from finetuner.errors import DataError

ROWS = [{"q": str(n), "a": "ä"} for n in range(5)]


def write(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "gz.jsonl").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "a.csv").write_text("q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in ROWS))
    (folder / "a.tsv").write_text("q\ta\n" + "".join(f"{row['q']}\t{row['a']}\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    (folder / "named.json").write_bytes((folder / "a.parquet").read_bytes())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "gz.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_every_kind_of_source_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = str(tmp_path / name)
    kinds: dict[str, Any] = {"csv": Csv(path), "tsv": Csv(path, delimiter="\t"), "parquet": Parquet(path)}
    found: Any = list(rows_of(kinds.get(name.split(".")[1], Json(path))))
    assert [row for _, row in found] == ROWS
    assert all(place.startswith(path + ":") for place, _ in found)


def test_several_files_are_read_one_after_another(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    found: Any = list(rows_of(Text(str(tmp_path))))
    assert [row["text"] for _, row in found] == ["a1", "a2", "b1", "b2", "c1", "c2"]
    found = list(rows_of(Text((f"{tmp_path}/c.txt", f"{tmp_path}/a.txt"), document="file")))
    assert [row["text"] for _, row in found] == ["c1\nc2", "a1\na2"]
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(DataError, match=r"E-DATA-EMPTY.*\n.*d\.txt"):
        list(rows_of(Text(str(tmp_path))))


def test_a_parquet_file_named_json_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=r"a Parquet file(.|\n)*Parquet\(\.\.\.\)"):
        list(rows_of(Json(str(tmp_path / "named.json"))))


def test_a_hub_data_set_comes_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    asked = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options, datasets.config.HF_HUB_OFFLINE))
        if not datasets.config.HF_HUB_OFFLINE:
            raise AssertionError("the network was asked")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found: Any = list(rows_of(Hub("ada/rows", subset="small")))
    assert [row for _, row in found] == ROWS
    assert found[1][0] == "ada/rows[train]:row 2"
    assert asked == [("ada/rows", {"name": "small", "split": "train", "revision": None}, True)]


def test_offline_touches_no_network_and_names_the_local_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="E-DATA-HUB") as caught:
        list(rows_of(Hub("nobody/nothing-here")))
    problem = caught.value.problems[0]
    assert "nobody/nothing-here" in problem.where
    assert "HF_HUB_OFFLINE is set" in problem.what
    assert "Json(" in problem.remedy
    assert "connection was opened" not in str(caught.value)


def test_a_data_set_with_a_script_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    canary = tmp_path / "canary"
    (folder / "scripted.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    with pytest.raises(DataError, match="E-DATA-HUB"):
        load_hub(Hub(str(folder)))
    assert not canary.exists()


def test_the_files_of_a_source_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    assert [path.name for path in files_of(Json(str(tmp_path)))] == ["a.json", "a.jsonl", "gz.jsonl", "named.json"]
    assert [path.name for path in files_of(Csv(str(tmp_path), delimiter="\t"))] == ["a.csv", "a.tsv"]
