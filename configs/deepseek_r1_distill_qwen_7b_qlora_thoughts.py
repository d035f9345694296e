"""DeepSeek-R1-Distill-Qwen-7B learns Mixture-of-Thoughts (math) through QLoRA: one GPU of 24 GB."""

from dataclasses import replace

from ._parts import THOUGHTS, qlora

base = qlora("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", THOUGHTS)

# The template that comes with the model leaves an answer's thinking out, also of the answer that is learned.
config = replace(base, model=replace(base.model, template="deepseek"))
