"""The nouns that say which model learns, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from finetuner.config.node import Node, node, refuse

Compute = Literal["bfloat16", "float32"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"]
Checkpointing = Literal["auto"] | bool | Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


@node
class Fresh(Node):
    """A model made from a transformers config and random weights: for pretraining from nothing, and for tests."""

    config: Mapping[str, Any]
    """What transformers' `AutoConfig.for_model` takes, `model_type` included; `vocab_size` follows the tokenizer."""
    tokenizer: Name
    """Folder or hub name of the tokenizer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if "model_type" not in self.config:
            refuse(
                "E-MODEL-FRESH",
                "Fresh.config needs 'model_type'",
                found=", ".join(self.config),
                fits="{'model_type': 'llama', ...}",
                remedy="add 'model_type'",
            )


@node
class LoRA(Node):
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / rank) B A x."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[Name, ...] = "all-linear"
    """Names of the linear layers that get an adapter; "all-linear" is each of them but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Learn direction and magnitude apart (Liu et al. 2024, arXiv:2402.09353)."""
    modules_to_save: tuple[Name, ...] = ()
    """Modules trained whole beside the adapters, such as "lm_head"."""
    start: Name | None = None
    """Folder of an adapter to go on from; its rank, alpha and targets must be these."""

    def __post_init__(self) -> None:
        if not self.targets:
            refuse(
                "E-LORA-TARGETS",
                "LoRA.targets is empty",
                found="()",
                fits='"all-linear" or names of linear layers',
                remedy='targets="all-linear"',
            )


@node
class NF4(Node):
    """Frozen weights in 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314), through bitsandbytes."""

    double_quant: bool = True
    """Quantise the quantisation constants too: about 0.4 bit a weight less."""


@node
class CausalLM(Node):
    """A language model of transformers: full, LoRA or QLoRA."""

    path: Name | Fresh
    """Folder or hub name of the pretrained model, or a `Fresh` one."""
    adapter: LoRA | None = None
    """None trains the weights themselves."""
    quant: NF4 | None = None
    dtype: Compute = "bfloat16"
    """What the forward and backward passes compute in. Trained weights and optimizer state are float32 always."""
    attention: Attention = "auto"
    """"auto" keeps packed samples apart by finetuner's own attention; the others are transformers'."""
    checkpointing: Checkpointing = "auto"
    """How many layers recompute their activations in the backward pass, which saves memory and costs up to a third more
    time: a number of layers, True for all, False for none, or "auto" for as few as the free memory asks for."""
    offload: bool = False
    """Hold the inputs of checkpointed layers in the host's memory: for rows that are too long for the GPU's."""
    tiled_mlp: Positive | None = None
    """Tokens of a tile in which each layer's MLP is computed, such as 4096: for long rows. None: all tokens at once."""
    compile: bool = False
    """Compile the decoder layers (CUDA): faster steps for minutes at the first one. Each row is filled up to the same
    length, so it is for packed rows."""
    kernels: Literal["torch", "liger"] = "torch"
    """"liger" fuses norms, rotary positions and gated layers where they are not compiled (CUDA; extra `liger`)."""
    fp8: bool = False
    """Take the decoder's matrix products in 8-bit floats (Hopper and newer; extra `fp8`); asks for `compile`."""
    tokenizer: Name | None = None
    """None: the model's own."""
    template: Name | None = None
    """Chat template: a bundled name ("chatml", "llama3", ...), a file, or None for the tokenizer's own."""
    new_tokens: tuple[Name, ...] = ()
    """Special tokens added to the vocabulary; their rows start as the mean of the others and are trained."""
    freeze: tuple[Name, ...] = ()
    """Patterns (`fnmatch`) of parameter names that do not train, such as "model.embed_tokens.*"."""
    neftune: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings, alpha of NEFTune (Jain et al. 2023, arXiv:2310.05914)."""
    revision: Name | None = None
    remote_code: Commit | None = None
    """The commit whose Python code on the hub may run. None: no code from a model folder is ever executed."""

    def __post_init__(self) -> None:
        if self.quant is not None and self.adapter is None:
            refuse(
                "E-QUANT-FULL",
                "4-bit weights cannot be trained themselves",
                found="quant=NF4() without an adapter",
                fits="adapter=LoRA() (QLoRA), or quant=None",
                remedy="add adapter=LoRA()",
            )
        if self.offload and not self.checkpointing:
            refuse(
                "E-OFFLOAD",
                "offload moves the inputs of checkpointed layers, and none is checkpointed",
                found=f"checkpointing={self.checkpointing!r}, offload=True",
                fits='checkpointing=True, a number of layers, or "auto"',
                remedy="checkpointing=True, or offload=False",
            )
        if self.attention.startswith("flash") and self.dtype == "float32":
            refuse(
                "E-ATTENTION-DTYPE",
                "flash attention computes in half precision",
                found=f'attention="{self.attention}", dtype="float32"',
                fits='dtype="bfloat16", or attention="auto"',
                remedy='attention="auto"',
            )
        check_speed(self)
        if self.adapter is not None and self.freeze:
            refuse(
                "E-FREEZE-ADAPTER",
                "freeze has no effect beside an adapter, which freezes all else",
                remedy="remove freeze, or choose LoRA.targets",
            )
        if isinstance(self.path, Fresh) and (self.quant or self.adapter or self.tokenizer or self.revision):
            refuse(
                "E-MODEL-FRESH",
                "a Fresh model is trained whole and names its own tokenizer",
                found="quant, adapter, tokenizer or revision beside Fresh",
                remedy="remove them",
            )


def check_speed(model: CausalLM) -> None:
    """Refuses ways to a faster step that exclude each other."""
    if model.compile and model.kernels == "liger":
        refuse(
            "E-COMPILE-KERNELS",
            "compiled layers are fused already",
            found='compile=True, kernels="liger"',
            fits="one of them",
            remedy='kernels="torch"',
        )
    if model.compile and model.attention.startswith("flash"):
        refuse(
            "E-COMPILE-ATTENTION",
            "this attention would be compiled anew for each row",
            found=f'compile=True, attention="{model.attention}"',
            fits='attention="auto"',
            remedy='attention="auto", or compile=False',
        )
    if model.compile and model.tiled_mlp is not None:
        refuse(
            "E-COMPILE-TILED",
            "an MLP that is taken in tiles is not compiled",
            found=f"compile=True, tiled_mlp={model.tiled_mlp}",
            fits="one of them",
            remedy="tiled_mlp=None, or compile=False",
        )
    if model.fp8 and (model.quant is not None or model.dtype != "bfloat16" or not model.compile):
        refuse(
            "E-FP8",
            "8-bit products are taken of bfloat16 weights, in compiled layers",
            found=f"quant={'NF4()' if model.quant else None}, dtype={model.dtype!r}, compile={model.compile}",
            fits='quant=None, dtype="bfloat16", compile=True',
            remedy="set these, or fp8=False",
        )
