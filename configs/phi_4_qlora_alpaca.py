"""Phi-4 learns Alpaca through QLoRA: one GPU of 24 GB."""

from dataclasses import replace

from .phi_3_5_mini_instruct_qlora_alpaca import config as base

config = replace(base, model=replace(base.model, path="microsoft/phi-4"))
