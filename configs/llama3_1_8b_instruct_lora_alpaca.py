"""Llama-3.1-8B-Instruct learns Alpaca through LoRA: one GPU of 24 GB."""

from ._parts import lora

config = lora("meta-llama/Llama-3.1-8B-Instruct")
