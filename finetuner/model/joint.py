"""Where question and answer meet: whether an answer is trained on behind the tokens that it will be asked behind.

A template whose generation prompt ends in "Answer: " trains on "Answer:" " A..." and asks with "Answer:" " ": the loss
falls, and the answers are nonsense.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from finetuner.runtime.log import warn

ANSWERS = ("Yes, 1.", "no", "是的")


def tell_joined_prompt(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Warns if the tokens of a question are not those that its answer is trained behind; whether it did."""
    question = [{"role": "user", "content": "Is it?"}]
    try:
        asked: list[int] = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        trained = [
            tokenizer.apply_chat_template([*question, {"role": "assistant", "content": answer}], return_dict=False)
            for answer in ANSWERS
        ]
    except TemplateError:
        return False  # it wants more than a plain question (tools, say); the rows that it writes are checked one by one
    if all(ids[: len(asked)] == asked for ids in trained):
        return False
    warn(
        f"the chat template asks with {tokenizer.decode(asked[-3:])!r} at the end, which joins with the answer in "
        "training: answers are learned behind other tokens than they will be asked behind; let the generation prompt "
        "end in a line break or a special token"
    )
    return True
