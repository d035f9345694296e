"""The tokenizer: whole, fast, with an end and a template, of the right files."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import rig
from transformers import AutoTokenizer

from finetuner.config.model import CausalLM, Fresh
from finetuner.dialogue.message import Dialogue, Document, Message
from finetuner.errors import ConfigError, ModelError
from finetuner.model.tokenizer import encoder_spec, load_tokenizer, need_template, stop_ids

PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    *"abcdefghijklmnop qrstuvwxyz!.".replace(" ", ""),
]


def settings(folder, **values):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = rig.tokenizer(tmp_path)
    held = json.loads((folder / "tokenizer_config.json").read_text())
    del held["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(held))
    with pytest.raises(ModelError, match="E-TOKENIZER-EOS"):
        load_tokenizer(CausalLM(str(folder)))


def test_no_template_is_an_error_only_where_one_is_needed(tmp_path):
    tokenizer = load_tokenizer(CausalLM(str(rig.tokenizer(tmp_path, template=None))))
    assert tokenizer.chat_template is None
    with pytest.raises(ModelError, match="E-TEMPLATE-NONE"):
        need_template(tokenizer)


def test_the_configs_template_goes_before_the_tokenizers(tmp_path):
    folder = str(rig.tokenizer(tmp_path))
    assert load_tokenizer(CausalLM(folder)).chat_template == rig.CHATML
    assert "im_start" in str(load_tokenizer(CausalLM(folder, template="chatml")).chat_template)
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        load_tokenizer(CausalLM(folder, template="chtml"))


def test_of_several_templates_the_default_counts(tmp_path):
    folder = rig.tokenizer(tmp_path, template=None)
    both = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    assert load_tokenizer(CausalLM(str(settings(folder, chat_template=both)))).chat_template == "A"
    with pytest.raises(ModelError, match="E-TEMPLATE-NAMED"):
        load_tokenizer(CausalLM(str(settings(folder, chat_template=both[1:]))))


@pytest.mark.parametrize("wrong", ["{", "[]", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_told(tmp_path, wrong):
    (rig.tokenizer(tmp_path) / "tokenizer.json").write_text(wrong)
    with pytest.raises(ModelError, match="E-TOKENIZER"):
        load_tokenizer(CausalLM(str(tmp_path)))


def test_a_tokenizer_that_needs_code_is_refused(tmp_path):
    folder = settings(
        rig.tokenizer(tmp_path), auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X"
    )
    (folder / "tokenization_x.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="E-TOKENIZER-CODE"):
        load_tokenizer(CausalLM(str(folder)))
    assert not (tmp_path / "canary").exists()


def test_the_tokenizer_of_another_folder_or_of_a_fresh_model(tmp_path):
    one, two = rig.tokenizer(tmp_path / "one"), rig.tokenizer(tmp_path / "two", eos="</s>")
    assert load_tokenizer(CausalLM(str(one), tokenizer=str(two))).eos_token == "</s>"
    assert load_tokenizer(CausalLM(Fresh({"model_type": "llama"}, str(two)))).name_or_path == str(two)


def test_answers_end_at_the_turns_end_and_at_eos(tmp_path):
    tokenizer = load_tokenizer(CausalLM(str(rig.tokenizer(tmp_path / "a", eos="</s>"))))
    assert stop_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    tokenizer = load_tokenizer(CausalLM(str(rig.tokenizer(tmp_path / "b"))))
    assert stop_ids(tokenizer) == (tokenizer.eos_token_id,)
    tokenizer = load_tokenizer(CausalLM(str(rig.tokenizer(tmp_path / "c", template=None))))
    assert stop_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_the_spec_encodes_as_the_tokenizer_does(tmp_path):
    folder = rig.tokenizer(tmp_path)
    tokenizer = load_tokenizer(CausalLM(str(folder), new_tokens=("<|call|>",)))
    encoder = encoder_spec(tokenizer, turns="all", system=None).build()
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]
    items = [Dialogue(tuple(Message(**turn) for turn in turns)), Document("quick fox")]
    dialogue, document = (part[0].ids.tolist() for part in encoder.encode(items))
    assert dialogue == tokenizer.apply_chat_template(turns)["input_ids"]
    assert document == [*tokenizer.encode("quick fox"), tokenizer.eos_token_id]
    assert len(encoder_spec(tokenizer, turns="last", system="x").fingerprint) == 64


def sentencepiece(folder, *, prefix):
    """An InternLM2 tokenizer's folder; pieces and scores of its BPE."""
    from transformers.convert_slow_tokenizer import import_protobuf

    words = [
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "lo",
        "▁h",
        "ab",
        "bc",
        "abc",
        "▁a",
        "!!",
        "or",
        "wor",
        "▁wor",
        "▁world",
    ]
    words += ["ld", "▁▁", "el"]
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces = prefix, False
    scores = {}
    for number, text in enumerate([*PIECES, *words, "[UNUSED_1]", "[UNUSED_2]"]):
        kind = {0: 2, 1: 3, 2: 3}.get(number, 6 if text.startswith("<0x") else 1)
        score = -float(number) if number >= 259 else 0.0
        proto.pieces.add(piece=text, score=score, type=kind)
        if kind == 1:
            scores[text] = (score, number)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    end = len(PIECES) + len(words)
    added = {"1": "<s>", "2": "</s>", str(end): "<|im_start|>", str(end + 1): "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "</s>", "add_bos_token": True, "chat_template": rig.CHATML,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {number: {"content": text, "special": True} for number, text in added.items()},
    }))  # fmt: skip
    return scores, end


def by_score(text, scores, prefix):
    """SentencePiece's BPE by its definition: join the neighbours whose joint piece scores best, leftmost first."""
    symbols = list((("▁" if prefix else "") + text).replace(" ", "▁"))
    while True:
        pairs = [(-scores[a + b][0], place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    ids = []
    for symbol in symbols:
        ids += [scores[symbol][1]] if symbol in scores else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("prefix", [False, True])
def test_internlm2s_pieces_are_joined_by_score(tmp_path, prefix):
    scores, end = sentencepiece(tmp_path, prefix=prefix)
    tokenizer = load_tokenizer(CausalLM(str(tmp_path)))
    generator = random.Random(0)
    texts = ["hello world!!", "abc  abc", "é☃ hello", "hellohello"]
    texts += [
        "".join(generator.choices(["he", "l", "lo", " ", "wor", "ld", "a", "b", "c", "!", "ü"], k=12))
        for _ in range(200)
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == by_score(text, scores, prefix), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("abc")[0] == 1
    assert tokenizer.encode("<|im_start|>abc<|im_end|>", add_special_tokens=False)[0] == end
    assert stop_ids(tokenizer) == (end + 1, 2)


def test_internlm2s_tokenizer_survives_a_save(tmp_path):
    sentencepiece(tmp_path / "base", prefix=False)
    tokenizer = load_tokenizer(CausalLM(str(tmp_path / "base")))
    tokenizer.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "hello  world"}, {"role": "assistant", "content": "é abc!!"}]
    assert again.apply_chat_template(turns) == tokenizer.apply_chat_template(turns)


def test_internlm2_without_files_or_with_damaged_ones_is_told(tmp_path):
    sentencepiece(tmp_path, prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="damaged"):
        load_tokenizer(CausalLM(str(tmp_path)))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match="missing"):
        load_tokenizer(CausalLM(str(tmp_path)))
