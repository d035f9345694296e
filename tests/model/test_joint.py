"""A generation prompt that joins with the answer is told of, and one that does not is not."""

import pytest
import rig
from transformers import AutoTokenizer

from finetuner.dialogue.template import bundled
from finetuner.model.joint import tell_joined_prompt

TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\n"
    "{% else %}Answer:SPACE{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:SPACE{% endif %}"
)


def test_a_space_at_the_end_is_told_of_where_words_carry_it(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġn", "Ġno"]
    built = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, [("Ġ", "n"), ("Ġn", "o")]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = TURNS.replace("SPACE", " ")
    assert tell_joined_prompt(tokenizer)
    tokenizer.chat_template = TURNS.replace("SPACE", "\n")
    assert not tell_joined_prompt(tokenizer)


@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "qwen2_5", "qwen3", "gemma", "phi3", "zephyr", "internlm2", "vicuna"]
)
def test_no_bundled_template_is_told_of(tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(rig.tokenizer(tmp_path, template=bundled(name)))
    assert not tell_joined_prompt(tokenizer)
