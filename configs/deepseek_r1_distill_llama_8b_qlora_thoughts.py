"""DeepSeek-R1-Distill-Llama-8B learns Mixture-of-Thoughts (math) through QLoRA: one GPU of 24 GB."""

from dataclasses import replace

from .deepseek_r1_distill_qwen_7b_qlora_thoughts import config as base

config = replace(base, model=replace(base.model, path="deepseek-ai/DeepSeek-R1-Distill-Llama-8B"))
