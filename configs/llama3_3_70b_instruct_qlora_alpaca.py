"""Llama-3.3-70B-Instruct learns Alpaca through QLoRA: one GPU of 80 GB."""

from dataclasses import replace

from .llama3_1_8b_instruct_qlora_alpaca import config as base

config = replace(base, model=replace(base.model, path="meta-llama/Llama-3.3-70B-Instruct"))
