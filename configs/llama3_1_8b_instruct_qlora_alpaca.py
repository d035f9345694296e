"""Llama-3.1-8B-Instruct learns Alpaca through QLoRA: one GPU of 16 GB."""

from ._parts import qlora

config = qlora("meta-llama/Llama-3.1-8B-Instruct")
