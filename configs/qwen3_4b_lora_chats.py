"""Qwen3-4B learns UltraChat through LoRA: one GPU of 24 GB."""

from ._parts import CHATS, lora

config = lora("Qwen/Qwen3-4B", CHATS)
