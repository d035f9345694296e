"""InternLM2.5-7B-chat learns Alpaca through LoRA: one GPU of 24 GB."""

from ._parts import lora

config = lora("internlm/internlm2_5-7b-chat")
