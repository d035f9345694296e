"""The nouns of a run: how it learns, how long, what it writes along the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from finetuner.config.data import Data, Dialogues, Documents, Mix
from finetuner.config.model import CausalLM, Fresh
from finetuner.config.node import Node, node, refuse

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=10)]


@node
class Steps(Node):
    """A duration in optimizer steps."""

    count: Positive


@node
class Epochs(Node):
    """A duration in passes over the data."""

    count: Annotated[float, Field(gt=0)]


@node
class AdamW(Node):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101). Norms, biases and embeddings never decay."""

    lr: Rate
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of a step's gradient; None does not clip."""
    rates: Mapping[str, Rate] = Field(default_factory=dict)
    """Learning rates of parts by name pattern (`fnmatch`); the first match counts: {"*embed*": 1e-5}."""
    bits: Literal[32, 8] = 32
    """8 keeps the moments in 8 bits, through bitsandbytes (CUDA)."""
    paged: bool = False
    """Moments move to the host's memory when the GPU's is short, through bitsandbytes (CUDA)."""
    lora_plus: Annotated[float, Field(gt=0)] | None = None
    """How many times the rate the B matrices of adapters learn at, such as 16 (LoRA+, arXiv:2402.12354). A pattern of
    `rates` counts first."""


@node
class Constant(Node):
    """Warms up, then holds the rate."""

    warmup: Fraction | Steps = 0.0
    """A share of all steps, or `Steps(n)`."""


@node
class Linear(Node):
    """Warms up, then falls in a line to `floor` times the rate."""

    warmup: Fraction | Steps = 0.03
    floor: Fraction = 0.0


@node
class Cosine(Node):
    """Warms up, then falls along half a cosine to `floor` times the rate (arXiv:1608.03983)."""

    warmup: Fraction | Steps = 0.03
    floor: Fraction = 0.0


@node
class WSD(Node):
    """Warms up, holds, then falls in a line over the last `decay` share of the steps (arXiv:2404.06395)."""

    warmup: Fraction | Steps = 0.03
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    floor: Fraction = 0.0


Schedule = Constant | Linear | Cosine | WSD


@node
class BatchSize(Node):
    """Rows of one optimizer step over all devices; how often gradients accumulate follows from it."""

    total: Positive
    per_device: Positive = 1
    """Rows that a device takes at once."""


@node
class Torch(Node):
    """Plain torch: one device, or data parallel over several processes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA when there is one."""


@node
class FSDP(Node):
    """FSDP2, torch's own: weights, gradients and moments are cut over all processes; each layer is gathered in turn."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    reshard: bool = True
    """Layers are let go after the forward pass and gathered again for the backward pass. False saves that traffic and
    holds the whole model in between."""
    offload: Literal["cpu"] | None = None
    """"cpu" keeps what is cut in the host's memory, where the optimizer steps, too."""


@node
class ZeRO(Node):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054): what the processes hold is cut among them.

    Stage 0 cuts nothing, 1 the optimizer's state, 2 the gradients besides, 3 the weights besides, frozen ones too.
    """

    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["cpu"] | None = None
    """"cpu" keeps the optimizer's state in the host's memory, where it steps, too; stages 1 to 3."""
    overrides: Mapping[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's own config, such as {"zero_optimization": {"overlap_comm": True}}; what this run says already
    is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.offload is not None and self.stage == 0:
            refuse(
                "E-ZERO-OFFLOAD",
                "stage 0 cuts nothing that could be offloaded",
                found=f"stage=0, offload={self.offload!r}",
                fits="stage=1, 2 or 3",
                remedy="stage=2, or offload=None",
            )


Engine = Torch | FSDP | ZeRO


@node
class Eval(Node):
    """Validation loss along the run, on data of its own or on a `fraction` held out of the training data."""

    data: Dialogues | Documents | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    every: Steps | None = None
    """None: at each save."""
    patience: Positive | None = None
    """Stop after this many evaluations without a better loss."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.fraction is None):
            refuse("E-EVAL", "Eval takes either data or fraction", remedy="Eval(fraction=0.02) or Eval(data=...)")


@node
class Ask(Node):
    """Questions that the model answers along the run; greedy, without effect on the training."""

    prompts: tuple[Name, ...]
    every: Steps | None = None
    """None: before the first step, at each save and at the end."""
    system: Name | None = None
    max_tokens: Positive = 128

    def __post_init__(self) -> None:
        if not self.prompts:
            refuse("E-ASK", "Ask has no question", found="prompts=()", fits='prompts=("Who?",)', remedy="add one")


@node
class Saves(Node):
    """When checkpoints are written and how many stay."""

    every: Steps | None = Steps(500)
    """None: only at the end."""
    keep: Positive = 2
    """The newest ones that stay; the best one, with `Eval`, stays besides."""
    background: bool = True
    """A step waits only for a copy of what is saved, in host memory: up to 12 bytes a trained weight. False: for the
    disk. What is written, and when the run ends, is the same."""


@node
class Logs(Node):
    """What is logged, and where to besides the terminal and metrics.jsonl."""

    every: Steps = Steps(10)
    to: tuple[Literal["tensorboard", "wandb", "swanlab", "trackio"], ...] = ()
    project: Name = "finetuner"


@node
class Run(Node):
    """A fine-tuning run."""

    model: CausalLM
    data: Data
    optim: AdamW
    batch: BatchSize
    until: Steps | Epochs
    schedule: Schedule = Cosine()
    engine: Engine = Torch()
    eval: Eval | None = None
    ask: Ask | None = None
    save: Saves = Saves()
    log: Logs = Logs()
    seed: Annotated[int, Field(ge=0)] = 0
    folder: Name | None = None
    """Where the run is written; None: work_dirs/ and the name of the config file."""
    max_runtime: Annotated[float, Field(gt=0)] | None = None
    """Hours after which the run saves and ends; the same command goes on from there."""

    def __post_init__(self) -> None:
        if self.optim.lora_plus is not None and self.model.adapter is None:
            refuse(
                "E-OPTIM-PLUS",
                "LoRA+ is for adapters, and the run trains the weights themselves",
                found=f"optim.lora_plus={self.optim.lora_plus:g} without an adapter",
                fits="model.adapter=LoRA()",
                remedy="add the adapter, or optim.lora_plus=None",
            )
        if self.eval is not None and self.eval.fraction is not None and isinstance(self.data, Mix):
            refuse("E-EVAL", "a fraction is held out of one data set, not of a Mix", remedy="give Eval(data=...)")
        if isinstance(self.engine, FSDP):
            self._check_fsdp()
        if isinstance(self.engine, ZeRO):
            self._check_zero(self.engine)

    def _check_fsdp(self) -> None:
        """Refuses what FSDP cannot cut, or is not known to compute the same."""
        unfit = (
            (self.model.quant is not None, "model.quant", "4-bit weights are packed with scales that cannot be cut"),
            (self.optim.bits == 8, "optim.bits", "8-bit moments come in blocks that cannot be cut"),
            (self.optim.paged, "optim.paged", "paged moments are not cut"),
            (bool(self.model.compile), "model.compile", "compiled layers are not gathered"),
            (self.model.fp8, "model.fp8", "fp8 layers are not gathered"),
        )
        for asked, field, what in unfit:
            if asked:
                remedy = f"leave {field} out, or engine=Torch()"
                refuse("E-FSDP", f"FSDP: {what}", found=field, fits="engine=Torch()", remedy=remedy)

    def _check_zero(self, zero: ZeRO) -> None:
        """Refuses what DeepSpeed does not compute as the run says."""
        sharded = zero.stage == 3
        unfit = (
            (self.optim.bits == 8, "optim.bits", "8-bit moments are not cut"),
            (self.optim.paged, "optim.paged", 'paged moments are not cut; offload="cpu" is DeepSpeed\'s way'),
            (sharded and self.model.quant is not None, "model.quant", "4-bit weights are packed and cannot be cut"),
            (sharded and isinstance(self.model.path, Fresh), "model.path", "a Fresh model is made whole"),
            (sharded and self.model.adapter is not None and self.model.adapter.dora, "model.adapter.dora",
             "DoRA reads the weights beside their layers"),
            (sharded and self.model.compile, "model.compile", "compiled layers are not gathered"),
            (sharded and self.model.fp8, "model.fp8", "fp8 layers are not gathered"),
            (sharded and bool(self.model.new_tokens), "model.new_tokens", "the cut embedding is not grown"),
        )  # fmt: skip
        for asked, field, what in unfit:
            if asked:
                fits = "engine=ZeRO(2)" if sharded and not field.startswith("optim") else "engine=Torch()"
                refuse("E-ZERO", f"ZeRO({zero.stage}): {what}", found=field, fits=fits, remedy=f"{fits}, or no {field}")
