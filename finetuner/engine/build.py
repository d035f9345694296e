"""A `Run`'s engine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import assert_never

import torch

from finetuner.config.run import FSDP, Run, Torch, ZeRO
from finetuner.engine.engine import Engine
from finetuner.engine.torch_engine import TorchEngine
from finetuner.engine.zero import deepspeed_config
from finetuner.errors import ConfigError, Problem
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.shards import WHOLE, Shards
from finetuner.runtime.log import say
from finetuner.runtime.ranks import world


def build_engine(run: Run, learner: CausalLearner, device: torch.device) -> Engine:
    """The engine that `run.engine` names, around `learner`."""
    match run.engine:
        case Torch():
            return TorchEngine(learner, run.optim, device)
        case FSDP():
            from finetuner.engine.fsdp_engine import FSDPEngine  # its parts of torch take seconds to import

            return FSDPEngine(learner, run.engine, run.optim, device)
        case ZeRO():
            check_zero()
            from finetuner.engine.deepspeed_engine import DeepSpeedEngine  # deepspeed takes seconds to import

            return DeepSpeedEngine(learner, run, device)
        case _:
            assert_never(run.engine)


def shards_for(run: Run, device: torch.device) -> Shards:
    """How the engine that `run.engine` names has weights lie on the ranks while they are read."""
    if isinstance(run.engine, FSDP) and world() > 1:
        say("FSDP cuts the model once it is loaded: until then each process holds all of it")
    if not isinstance(run.engine, ZeRO) or run.engine.stage < 3:
        return WHOLE
    check_zero()
    from finetuner.engine.zero_shards import ZeroShards

    return ZeroShards(deepspeed_config(run), device)


def check_engine(run: Run, device: torch.device) -> None:
    """Refuses an engine that is not there, or whose overrides contradict the run, before anything is read.

    Raises:
        ConfigError: E-EXTRA, E-ZERO-OVERRIDE, E-OFFLOAD.
    """
    if isinstance(run.engine, FSDP) and run.engine.offload and device.type != "cuda":
        what, found = "there is no other memory to offload to", f"device {device}"
        raise ConfigError(Problem("E-OFFLOAD", what, "engine.offload", found, "a GPU", "engine.offload=None"))
    if isinstance(run.engine, ZeRO):
        check_zero()
        deepspeed_config(run)


def check_zero() -> None:
    """Refuses ZeRO without DeepSpeed.

    Raises:
        ConfigError: E-EXTRA.
    """
    if find_spec("deepspeed") is None:
        remedy = "pip install 'finetuner[deepspeed]', or engine=FSDP()"
        raise ConfigError(Problem("E-EXTRA", "deepspeed is not installed", "engine", "ZeRO()", remedy=remedy))
