"""InternLM3-8B-instruct learns Alpaca through QLoRA: one GPU of 16 GB."""

from ._parts import qlora

config = qlora("internlm/internlm3-8b-instruct")
