"""Mistral-7B-Instruct-v0.3 learns Alpaca through QLoRA: one GPU of 16 GB."""

from ._parts import qlora

config = qlora("mistralai/Mistral-7B-Instruct-v0.3")
