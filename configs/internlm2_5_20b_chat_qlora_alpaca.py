"""InternLM2.5-20B-chat learns Alpaca through QLoRA: one GPU of 40 GB."""

from dataclasses import replace

from .internlm2_5_7b_chat_qlora_alpaca import config as base

config = replace(base, model=replace(base.model, path="internlm/internlm2_5-20b-chat"))
