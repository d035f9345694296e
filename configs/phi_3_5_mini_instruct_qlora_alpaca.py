"""Phi-3.5-mini-instruct learns Alpaca through QLoRA: one GPU of 12 GB."""

from ._parts import qlora

config = qlora("microsoft/Phi-3.5-mini-instruct")
