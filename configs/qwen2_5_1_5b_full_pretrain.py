"""Qwen2.5-1.5B goes on reading, with all its weights, from your texts in data/texts: one GPU of 40 GB."""

from dataclasses import replace

from finetuner import Documents, Epochs, Eval, Text

from ._parts import full

config = replace(
    full("Qwen/Qwen2.5-1.5B"),
    data=Documents(Text("data/texts/*.txt", document="file"), length=4096),
    eval=Eval(fraction=0.01),
    until=Epochs(1),
    ask=None,
)
