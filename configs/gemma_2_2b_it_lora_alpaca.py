"""Gemma-2-2B-it learns Alpaca through LoRA: one GPU of 16 GB."""

from ._parts import lora

config = lora("google/gemma-2-2b-it")
