"""`Run` -> DeepSpeed's config: a pure function; no file is read beside it.

Each field has one owner. What the run says (batch, clipping, rates, dtype) is written here and cannot be overridden;
`overrides` reach DeepSpeed's own dials only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.config.run import Run, ZeRO
from finetuner.errors import ConfigError, Problem

OWNED = {
    "train_batch_size": "batch.total",
    "train_micro_batch_size_per_gpu": "batch.per_device",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "communication_data_type": "the rule that gradients are summed in float32",
    "prescale_gradients": "the step's learned tokens",
    "gradient_predivide_factor": "the step's learned tokens",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "activation_checkpointing": "model.checkpointing",
    "sequence_parallel_size": "the whole rows that each process takes",
    "seed": "seed",
}
"""Keys of DeepSpeed's config that a field of the run decides, and which."""


def deepspeed_config(run: Run) -> dict[str, Any]:
    """DeepSpeed's config of a run whose engine is `ZeRO`.

    DeepSpeed counts each micro-batch as a step of its own: where a step ends our loop says.

    Raises:
        ConfigError: E-ZERO-OVERRIDE, an override contradicts the run.
    """
    zero = run.engine
    assert isinstance(zero, ZeRO)
    made = own(run, zero)
    told = [(key, value) for key, value in leaves(zero.overrides) if owner(key) is not None]
    if told:
        rows = [f"{key}={value!r}, where {owner(key)} gives {at(made, key)!r}" for key, value in told]
        what, fits = "an override is decided by the run already", "DeepSpeed's own dials, such as overlap_comm"
        remedy = "set it there: " + ", ".join(dict.fromkeys(str(owner(key)) for key, _ in told))
        raise ConfigError(Problem("E-ZERO-OVERRIDE", what, "engine.overrides", "\n".join(rows), fits, remedy))
    return merged(made, zero.overrides)


def own(run: Run, zero: ZeRO) -> dict[str, Any]:
    """The config without overrides."""
    cut: dict[str, Any] = {"stage": zero.stage}
    if zero.offload is not None:
        cut["offload_optimizer"] = {"device": zero.offload}
    return {
        "train_micro_batch_size_per_gpu": run.batch.per_device,
        "gradient_accumulation_steps": 1,
        # Without ZeRO the engine clips, in the same place as it does for plain torch.
        "gradient_clipping": (run.optim.clip or 0.0) if zero.stage else 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": cut,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def owner(key: str) -> str | None:
    """The field of the run that decides `key`, "a.b.c"; None if it is DeepSpeed's own."""
    return next((field for owned, field in OWNED.items() if f"{key}.".startswith(f"{owned}.")), None)


def leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """("zero_optimization.overlap_comm", True), ..."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def at(values: Mapping[str, Any], key: str) -> Any:
    """The value at "a.b.c", or None."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the leaves of `more` in them."""
    result = copy.deepcopy(dict(values))
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result
