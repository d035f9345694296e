"""Mistral-7B-Instruct-v0.3 learns Alpaca through LoRA: one GPU of 24 GB."""

from ._parts import lora

config = lora("mistralai/Mistral-7B-Instruct-v0.3")
