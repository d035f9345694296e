"""InternLM2-chat-1.8B learns Alpaca through QLoRA: one GPU of 8 GB."""

from ._parts import qlora

config = qlora("internlm/internlm2-chat-1_8b")
