"""A tiny model that was taught one answer by heart, so that what it says and where it stops is known."""

from pathlib import Path

import pytest
import rig
import torch
from taught_words import SAID
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model answers `SAID` to "who?", and ends its turn."""
    folder = rig.tiny_llama(tmp_path_factory.mktemp("taught"), initializer_range=0.1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": SAID}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt", add_special_tokens=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(input_ids=ids.input_ids, labels=ids.input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.05
    model.save_pretrained(folder)
    return folder
