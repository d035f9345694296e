"""InternLM2.5-7B-chat learns Alpaca through QLoRA: one GPU of 16 GB."""

from ._parts import qlora

config = qlora("internlm/internlm2_5-7b-chat")
