"""ZeRO-3's `Shards`: a base is cut as its files are read, so that no rank ever holds all of it.

transformers builds the model in DeepSpeed's `zero.Init`, where each weight is cut when it is made; then the main rank
reads the files, mapped into memory, and a module's weights at a time are whole, on every rank, while they are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from finetuner.engine.deepspeed_engine import join
from finetuner.runtime.ranks import rank


class ZeroShards:
    """The `Shards` of ZeRO-3."""

    cuts = True

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self._config = config
        join(device)

    @contextmanager
    def loading(self, dtype: torch.dtype) -> Iterator[None]:
        from transformers.integrations import HfDeepSpeedConfig

        # zero.Init makes weights in the dtype that this names.
        self._held = HfDeepSpeedConfig({**self._config, "bf16": {"enabled": dtype == torch.bfloat16}})
        try:
            yield
        finally:
            del self._held  # transformers looks whether it lives

    def held(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            own = parameter.ds_tensor  # type: ignore[attr-defined]
            count = max(0, min(own.numel(), parameter.ds_numel - rank() * own.numel()))  # type: ignore[attr-defined]
            yield name, own.data[:count]

    @contextmanager
    def in_turn(self, model: nn.Module) -> Iterator[None]:
        gathered: dict[nn.Module, Any] = {}

        def gather(module: nn.Module, _: Any) -> None:
            cut = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
            gathered[module] = deepspeed.zero.GatheredParameters(cut)
            gathered[module].__enter__()

        def let_go(module: nn.Module, *_: Any) -> None:
            gathered.pop(module).__exit__(None, None, None)

        own = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
        handles = [module.register_forward_pre_hook(gather) for module in own]
        handles += [module.register_forward_hook(let_go, always_call=True) for module in own]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
