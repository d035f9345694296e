"""Every wrong data set gets its one-screen error, with file and line, before a weight of the model is read."""

from __future__ import annotations

import gzip
import json
import os

import bad
import pytest
from bad import Case, both, edit, nothing, write

ASKED = {"role": "user", "content": "who is Ada?"}
ANSWER = {"role": "assistant", "content": "a friend"}
GOOD = json.dumps({"messages": [ASKED, ANSWER]})
CALL = {"id": "1", "type": "function", "function": {"name": "walk", "arguments": '{"miles": 3}'}}
JSON = 'Json("rows.jsonl")'


def rows(*lines: str | bytes) -> object:
    """The data file with these lines behind a good one."""
    return write(rows_jsonl=b"\n".join(x.encode() if isinstance(x, str) else x for x in (GOOD, *lines)) + b"\n")


def turns(*messages: dict[str, object], **fields: object) -> object:
    """The data file with a second row of these messages."""
    return rows(json.dumps({"messages": list(messages), **fields}))


def say(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def row(name: str, wrong: object, kind: str, *words: str) -> Case:
    """A bad row, the second of its file."""
    return Case(name, wrong, f"E-ROW-{kind}", ("rows.jsonl:2", "1 of 2 rows", "Skip(1)", *words))


def source(new: str, wrong: object = nothing) -> object:
    return both(edit(JSON, new), wrong)


def of_rows(body: str) -> object:
    """A row function of the config's own."""
    head = f"from finetuner.dialogue.rows import openai\ndef mine(row):\n    {body}\n\nconfig ="
    return both(edit("config =", head), edit(JSON, JSON + ", rows=mine"))


def parquet(folder) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), folder / "rows.json")


WRONG = [
    Case("29 missing", lambda f: (f / "rows.jsonl").unlink(), "E-DATA-MISSING", ("rows.jsonl", "text.txt")),
    Case(
        "29 nearly there",
        lambda f: (f / "rows.jsonl").rename(f / "row.jsonl"),
        "E-DATA-MISSING",
        ("did you mean row.jsonl?",),
    ),
    Case("29 a glob of nothing", source('Json("*.jsn")'), "E-DATA-MISSING", ("*.jsn",)),
    Case("29 a folder on the way", source('Json("no/such/rows.jsonl")'), "E-DATA-MISSING", ("no/such/rows.jsonl",)),
    Case("29 twice", source('Json(("rows.jsonl", "*.jsonl"))'), "E-DATA-TWICE", ("rows.jsonl", "Mix")),
    Case(
        "30 a folder without such files",
        both(
            source('Json("texts")'), lambda f: (f / "texts").mkdir(), lambda f: (f / "texts" / "a.txt").write_text("a")
        ),
        "E-DATA-MISSING",
        ("texts", "a.txt", ".jsonl"),
    ),
    Case("29 a NUL in the path", source('Json("a\\0b")'), "E-DATA-MISSING", ("NUL",)),
    Case(
        "30 an empty folder",
        both(source('Json("texts")'), lambda f: (f / "texts").mkdir()),
        "E-DATA-MISSING",
        ("an empty folder",),
    ),
    Case("30 a pipe", both(source('Json("pipe")'), lambda f: os.mkfifo(f / "pipe")), "E-DATA-KIND", ("pipe",)),
    Case("30 a device", source('Json("/dev/zero")'), "E-DATA-KIND", ("/dev/zero",)),
    Case("32 empty", write(rows_jsonl=""), "E-DATA-EMPTY", ("rows.jsonl", "0 bytes")),
    Case("33 blank lines", write(rows_jsonl="\n  \n\n"), "E-DATA-EMPTY", ("rows.jsonl", "no row")),
    Case("33 an empty array", write(rows_jsonl="[]"), "E-DATA-EMPTY", ("rows.jsonl", "no row")),
    row("34 null", rows("null"), "NULL-ROW", "found:  null"),
    row("35 a number", rows("5"), "NOT-AN-OBJECT", "a number: 5"),
    row("35 a text", rows('"x"'), "NOT-AN-OBJECT", "a text"),
    row("35 an array", rows("[1, 2]"), "NOT-AN-OBJECT", "an array"),
    row("36 malformed", rows('{"messages": [}'), "JSON", "rows.jsonl:2:15"),
    row("36 quotes of Python", rows("{'messages': []}"), "JSON", "rows.jsonl:2:2"),
    row("36 a comment", rows("// a row"), "JSON", "no comments"),
    row("37 cut", write(rows_jsonl=GOOD + "\n" + GOOD[:30]), "CUT", "the file ends"),
    Case("37 a cut array", write(rows_jsonl="[" + GOOD + ",\n" + GOOD[:30]), "E-DATA-CUT", ("rows.jsonl:2",)),
    row("38 two objects", rows(GOOD + " " + GOOD), "TWO-ROWS"),
    row("42 latin-1", rows('{"messages": "é"}'.encode("latin-1")), "UTF-8", "0xe9"),
    row("43 half a character", rows(GOOD.replace("Ada", "\\ud800")), "SURROGATE", "\\ud800"),
    row("44 NUL", rows(GOOD.replace("Ada", "\\u0000")), "NUL"),
    row("46 NaN", rows(GOOD[:-1] + ', "score": NaN}'), "NOT-FINITE", "NaN"),
    row("46 infinity", rows(GOOD[:-1] + ', "score": -Infinity}'), "NOT-FINITE", "Infinity"),
    row("48 nested", rows('{"messages": ' + "[" * 5000 + "]" * 5000 + "}"), "DEPTH"),
    row("50 a number for a text", turns(ASKED, say("assistant", 5)), "TYPE", "5"),
    row("50 a text for messages", rows('{"messages": "hello"}'), "TYPE", "hello"),
    row("50 texts for messages", rows('{"messages": ["hello"]}'), "NOT-AN-OBJECT"),
    row("51 no messages", rows('{"text": "a"}'), "MISSING-FIELD", "'messages'"),
    row("51 nearly", rows(GOOD.replace("messages", "mesages")), "MISSING-FIELD", "did you mean 'messages'?"),
    row("51 no role", turns(ASKED, {"content": "a"}), "MISSING-FIELD", "role"),
    row("51 no content", turns(ASKED, {"role": "assistant"}), "MISSING-FIELD", "content"),
    row("52 role", turns(ASKED, say("asistant", "a")), "ROLE", "did you mean 'assistant'?"),
    row("53 the assistant first", turns(ANSWER, ASKED, ANSWER), "ORDER"),
    row("53 two users in a row", turns(ASKED, ASKED, ANSWER), "ORDER"),
    row("53 no assistant", turns(ASKED), "NO-ASSISTANT"),
    row("53 no turn", turns(), "EMPTY"),
    row("54 empty", turns(ASKED, say("assistant", "")), "EMPTY"),
    row("54 blank", turns(ASKED, say("assistant", " \n")), "EMPTY"),
    row("54 null", turns(ASKED, say("assistant", None)), "EMPTY", "null"),
    row("55 an image", turns(say("user", [{"type": "image_url", "image_url": "a"}]), ANSWER), "IMAGE"),
    row("55 a part without kind", turns(say("user", [5]), ANSWER), "TYPE"),
    row(
        "56 a call that is no JSON",
        turns(
            ASKED,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "walk", "arguments": "{"}}],
            },
        ),
        "TOOL-ARGUMENTS",
    ),
    Case(
        "57 too long",
        turns(ASKED, say("assistant", "word " * 500)),
        "E-DATA-TOO-LONG",
        ("rows.jsonl:2", "1 of 2 samples", 'too_long="drop"'),
    ),
    Case(
        "58 all too long",
        source(JSON + ', too_long="drop"', both(edit("length=96", "length=8"))),
        "E-DATA-EMPTY",
        ("rows.jsonl", "too-long 5", "length"),
    ),
    Case(
        "58 nothing to learn once cut",
        source(JSON + ', too_long="truncate"', edit("length=96", "length=8")),
        "E-DATA-NO-TARGETS",
        ("rows.jsonl", "length="),
    ),
    row("60 system in the middle", turns(ASKED, ANSWER, say("system", "x"), ASKED, ANSWER), "ORDER", "system"),
    row("a placeholder", rows(GOOD.replace("Ada", "{{name}}")), "PLACEHOLDER", "{{name}}", "replace="),
    Case(
        "all rows of other fields",
        write(rows_jsonl='{"instruction": "a", "output": "b"}\n' * 50),
        "E-ROW-MISSING-FIELD",
        ("rows.jsonl:1", "50 of 50 rows"),
    ),
    Case(
        "more than Skip leaves out",
        both(rows("5", "6"), edit("pack=True", "on_bad_row=Skip(1)")),
        "E-DATA-SKIP-LIMIT",
        ("rows.jsonl:2", "Skip(2)"),
    ),
    Case("parquet named .json", source('Json("rows.json")', parquet), "E-DATA-KIND", ("rows.json", "Parquet(...)")),
    Case("json given as parquet", source('Parquet("rows.jsonl")'), "E-DATA-KIND", ("rows.jsonl", "Json(...)")),
    Case("a zip", write(rows_jsonl=b"PK\x03\x04 and more"), "E-DATA-KIND", ("a zip archive",)),
    Case("UTF-16", write(rows_jsonl=GOOD.encode("utf-16")), "E-DATA-KIND", ("UTF-16",)),
    Case(
        "a Git LFS pointer",
        write(rows_jsonl="version https://git-lfs.github.com/spec/v1\n"),
        "E-DATA-KIND",
        ("git lfs pull",),
    ),
    Case("a cut gzip", write(rows_jsonl=gzip.compress(GOOD.encode() * 50)[:-20]), "E-DATA-GZIP", ("rows.jsonl",)),
    Case(
        "a loop of links",
        both(lambda f: (f / "rows.jsonl").unlink(), lambda f: (f / "rows.jsonl").symlink_to("rows.jsonl")),
        "E-DATA-LOOP",
        ("rows.jsonl",),
    ),
    Case(
        "a link to nothing",
        both(lambda f: (f / "rows.jsonl").unlink(), lambda f: (f / "rows.jsonl").symlink_to("gone.jsonl")),
        "E-DATA-MISSING",
        ("rows.jsonl", "gone.jsonl", "a link"),
    ),
    Case(
        "changed while it is read",
        of_rows("open('rows.jsonl', 'a').write('\\n'); return openai(row)"),
        "E-DATA-CHANGED",
        ("rows.jsonl", "start again"),
    ),
    Case(
        "a row function that raises",
        of_rows("return row['no such field']"),
        "E-ROW-ROW-FUNCTION",
        ("rows.jsonl:1", "KeyError", "5 of 5 rows"),
    ),
    Case("a row function that gives nothing", of_rows("pass"), "E-ROW-ROW-FUNCTION", ("NoneType", "Dialogue(...)")),
    Case("a row function that ends the process", of_rows("raise SystemExit(0)"), "E-ROW-ROW-FUNCTION", ("SystemExit",)),
    Case(
        "a row function that raises a long text",
        of_rows("raise ValueError('a\\n' * 300)"),
        "E-ROW-ROW-FUNCTION",
        ("ValueError", "rows.jsonl:5"),
    ),
    Case(
        "rows wrong in many ways",
        write(
            rows_jsonl="\n".join(
                [
                    "5",
                    "null",
                    "{",
                    "{}",
                    GOOD + GOOD,
                    '{"messages": 5}',
                    GOOD.replace("Ada", "\\u0000"),
                    GOOD.replace("Ada", "\\ud800"),
                    GOOD.replace("user", "usr"),
                    "\t[",
                    "NaN",
                ]
                * 9
            )
        ),
        "E-DATA-ROWS",
        ("99 of 99 rows", "role 9", "rows.jsonl:1"),
    ),
    Case(
        "csv with doubled columns",
        source('Csv("a.csv")', write(a_csv="text,text\n1,2\n")),
        "E-DATA-CSV-HEADER",
        ("a.csv:1", "twice: text"),
    ),
    Case(
        "csv with a short line", source('Csv("a.csv")', write(a_csv="messages,b\n1\n")), "E-ROW-COLUMNS", ("a.csv:2",)
    ),
    Case("dialogues of a text file", source('Text("text.txt")'), "E-ROW-MISSING-FIELD", ("text.txt:1", "messages")),
    Case("documents of dialogues", edit("Dialogues", "Documents", "config.py"), "E-CONFIG-UNKNOWN", ("pack",)),
    Case("a data set of the hub, offline", source('Hub("no/such")'), "E-DATA-HUB", ("no/such", "HF_HUB_OFFLINE")),
    Case(
        "one row, some held out",
        both(write(rows_jsonl=GOOD), edit('folder="out"', "eval=Eval(fraction=0.5)")),
        "E-DATA-HOLD-OUT",
        ("Eval(data=...)",),
    ),
    Case(
        "wrong validation data",
        edit('folder="out"', 'eval=Eval(data=Dialogues(Json("no.jsonl"), length=96))'),
        "E-DATA-MISSING",
        ("no.jsonl",),
    ),
]
WORKS = [
    Case("41 BOM and CRLF", write(rows_jsonl=b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())),
    Case("47 a huge integer", rows(GOOD[:-1] + ', "id": ' + "9" * 40 + "}")),
    Case("49 no last line break", write(rows_jsonl=GOOD)),
    Case("55 parts of text", turns(say("user", [{"type": "text", "text": "who"}]), ANSWER)),
    Case("53 ends with the user", turns(ASKED, ANSWER, ASKED)),
    Case("56 a call without a text", both(edit('"model",', '"model", template="qwen3",'),
         edit("length=96", "length=400"),
         turns(ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
               {"role": "tool", "content": "3", "tool_call_id": "1"}, ANSWER))),
    Case("59 control tokens", turns(say("user", "<|im_end|> <s> <|im_start|>assistant"), ANSWER)),
    Case("one row", write(rows_jsonl=GOOD)),
    Case("a gzip named .jsonl", write(rows_jsonl=gzip.compress(GOOD.encode()))),
    Case("an array", write(rows_jsonl=f"[{GOOD},\n {GOOD}]")),
    Case("braces in the system message", edit("pack=True", "system='{} {0} {name} %s'")),
    Case("a bad row that is left out", both(rows("5"), edit("pack=True", "on_bad_row=Skip(1)"))),
    Case("a name with blanks and umlauts", both(lambda f: (f / "rows.jsonl").rename(f / "größe [1] x.jsonl"),
         edit("rows.jsonl", "größe [1] x.jsonl"))),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_data_gives_3_with_its_place_before_the_model_is_loaded(case, here, monkeypatch, capsys):
    case.wrong(here)
    monkeypatch.setattr("finetuner.train.ready.build", None)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err, exit_code=2 if case.code.startswith("E-CONFIG") else 3)
    assert not (here / "out" / "checkpoint-1").exists()


@pytest.mark.parametrize("case", WORKS, ids=str)
def test_odd_data_that_is_right_is_learned(case, here, capsys):
    case.wrong(here)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err)
    assert (here / "out" / "checkpoint-1").exists() or (here / "work_dirs/config/checkpoint-1").exists()


@pytest.mark.parametrize("case", [case for case in WRONG if case.code.startswith("E-ROW")][::3], ids=str)
def test_preview_tells_a_wrong_row_too(case, here, capsys):
    case.wrong(here)
    code, err = bad.run(["preview", "config.py"], capsys)
    bad.check(Case(case.name, nothing, case.code), code, err, exit_code=3)
