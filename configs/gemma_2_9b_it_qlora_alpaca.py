"""Gemma-2-9B-it learns Alpaca through QLoRA: one GPU of 24 GB."""

from ._parts import qlora

config = qlora("google/gemma-2-9b-it")
