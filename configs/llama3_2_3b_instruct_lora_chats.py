"""Llama-3.2-3B-Instruct learns UltraChat through LoRA: one GPU of 16 GB."""

from ._parts import CHATS, lora

config = lora("meta-llama/Llama-3.2-3B-Instruct", CHATS)
