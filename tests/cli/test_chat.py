"""`finetuner chat` and `finetuner merge` as a person or a script calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rig

ROOT = Path(__file__).parent.parent.parent
CALL = "import sys; from finetuner.cli.main import main; sys.exit(main())"


def call(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", CALL, *words], input=stdin, capture_output=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.tiny_llama(tmp_path_factory.mktemp("model"), initializer_range=0.1)


def test_each_ask_is_a_conversation_of_its_own_and_a_line(model: Path) -> None:
    words = ("chat", str(model), "--ask", "hello", "who?", "hello", "--max-tokens", "9", "--device", "cpu")
    done = call(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[2]
    assert call(*words).stdout == done.stdout
    drawn = (*words, "--temperature", "2", "--seed", "5")
    assert call(*drawn).stdout == call(*drawn).stdout != done.stdout


def test_a_session_over_a_pipe_survives_everything_typed(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a b.jsonl"
    typed = b"\n".join([b"hello", b"", b"/quit", b"\xff\xfe bytes", b"x" * 1_000_000, b"/system Be kind.", b"again",
                        f"/save {saved}".encode(), b"/reset", b"end without newline"])  # fmt: skip
    done = call("chat", str(model), "--max-tokens", "4", "--device", "cpu", stdin=typed)
    told = done.stderr.decode()
    assert done.returncode == 0, told
    assert "no command /quit" in told
    assert "not UTF-8" in told
    assert "E-ASK-LENGTH" in told
    assert "/reset" in told
    assert "Traceback" not in told
    assert b"\x1b" not in done.stdout
    assert saved.read_text().count('"assistant"') == 3
    assert call("chat", str(model), "--device", "cpu", stdin=b"/exit\nhello\n").stdout == b""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--temperature", "-1"), "from 0 to 10"),
        (("--temperature", "nan"), "from 0 to 10"),
        (("--max-tokens", "0"), "whole number"),
        (("--max-tokens", "2.5"), "whole number"),
        (("--top-p", "2"), "above 0"),
        (("--ask", " "), "--ask needs a text"),
        (("--ask",), "--ask"),
        (("--quant", "int3"), "nf4"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(words: tuple[str, ...], told: str) -> None:
    done = call("chat", "./nowhere", *words)
    assert done.returncode == 2
    assert told in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_a_folder_that_is_not_there_ends_with_4() -> None:
    for words in (("chat", "./nowhere", "--ask", "hi"), ("merge", "./nowhere", "out")):
        done = call(*words)
        assert (done.returncode, b"E-MODEL-PATH" in done.stderr) == (4, True)


def test_merge_prints_its_check_and_chat_talks_with_what_it_wrote(model: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    done = call("merge", str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == str(tmp_path / "out")
    assert "logits of the merged model differ" in done.stderr.decode()
    ask = ("--ask", "hello", "--max-tokens", "9", "--device", "cpu")
    assert call("chat", str(tmp_path / "out"), *ask).stdout == call("chat", str(tmp_path / "adapter"), *ask).stdout
