"""DeepSeek-R1-Distill-Qwen-7B learns Mixture-of-Thoughts (math) through QLoRA: one GPU of 24 GB."""

from ._parts import THOUGHTS, qlora

config = qlora("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", THOUGHTS)
