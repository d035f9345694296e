"""Qwen2.5-7B-Instruct learns Alpaca through QLoRA: one GPU of 16 GB."""

from ._parts import qlora

config = qlora("Qwen/Qwen2.5-7B-Instruct")
