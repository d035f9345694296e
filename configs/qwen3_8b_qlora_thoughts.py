"""Qwen3-8B learns Mixture-of-Thoughts (math) through QLoRA: one GPU of 24 GB."""

from ._parts import THOUGHTS, qlora

config = qlora("Qwen/Qwen3-8B", THOUGHTS)
