"""A field's type in words, and what was most likely meant by a value or a name that does not fit.

Annotated[int, Field(gt=0)] | None  ->  "a whole number above 0, or None"
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    NoneType: "None",
    Any: "anything",
}
CONSTANTS = {"none": "None", "null": "None", "true": "True", "false": "False", "yes": "True", "no": "False"}
SYNONYMS = {"gpu": "cuda", "float": "float32", "half": "bfloat16", "flash": "flash_attention_2"}
BOUNDS = {
    "gt": "above {}",
    "ge": "of {} or more",
    "lt": "below {}",
    "le": "of {} or less",
    "min_length": "of {} characters or more",
    "max_length": "of {} characters at most",
    "pattern": "that matches {}",
}
OTHER_TOOLS = {
    "learning_rate": ("AdamW", "lr"),
    "weight_decay": ("AdamW", "weight_decay"),
    "max_norm": ("AdamW", "clip"),
    "max_grad_norm": ("AdamW", "clip"),
    "batch_size": ("BatchSize", "total"),
    "per_device_train_batch_size": ("BatchSize", "per_device"),
    "accumulation": ("BatchSize", "total"),
    "accumulative_counts": ("BatchSize", "total"),
    "gradient_accumulation_steps": ("BatchSize", "total"),
    "epochs": ("Run", "until=Epochs(...)"),
    "max_epochs": ("Run", "until=Epochs(...)"),
    "num_train_epochs": ("Run", "until=Epochs(...)"),
    "steps": ("Run", "until=Steps(...)"),
    "max_steps": ("Run", "until=Steps(...)"),
    "max_iters": ("Run", "until=Steps(...)"),
    "warmup_ratio": ("Cosine", "warmup"),
    "warmup_steps": ("Cosine", "warmup=Steps(...)"),
    "max_length": ("Dialogues", "length"),
    "max_seq_length": ("Dialogues", "length"),
    "packing": ("Dialogues", "pack"),
    "pack_to_max_length": ("Dialogues", "pack"),
    "dataset_map_fn": ("Dialogues", "rows"),
    "r": ("LoRA", "rank"),
    "lora_rank": ("LoRA", "rank"),
    "lora_alpha": ("LoRA", "alpha"),
    "lora_dropout": ("LoRA", "dropout"),
    "target_modules": ("LoRA", "targets"),
    "lora": ("CausalLM", "adapter=LoRA(...)"),
    "load_in_4bit": ("CausalLM", "quant=NF4()"),
    "torch_dtype": ("CausalLM", "dtype"),
    "attn_implementation": ("CausalLM", "attention"),
    "gradient_checkpointing": ("CausalLM", "checkpointing"),
    "pretrained_model_name_or_path": ("CausalLM", "path"),
    "trust_remote_code": ("CausalLM", "remote_code"),
    "output_dir": ("Run", "folder"),
    "work_dir": ("Run", "folder"),
    "save_steps": ("Saves", "every=Steps(...)"),
    "save_total_limit": ("Saves", "keep"),
    "report_to": ("Logs", "to"),
}
"""What other tools call a field -> (noun, field)."""


@cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a node's fields, constraints included."""
    return get_type_hints(cls, include_extras=True)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not given; `dataclasses.MISSING` where it must be."""
    if isinstance(field.default, FieldInfo):
        return field.default.get_default(call_default_factory=True)
    return field.default


def words(annotation: Any) -> str:
    """The type in words, such as "a whole number above 0"."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([words(args[0]), " and ".join(bounds(args[1:]))]).strip()
    if origin in (Union, UnionType):
        kinds = [words(arg) for arg in args]
        return ", ".join(kinds[:-1]) + (", or " if len(kinds) > 2 else " or ") + kinds[-1]
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        if args[-1] is ...:
            return f"a tuple of {words(args[0])}"
        return f"({', '.join(map(words, args))})"
    if origin is not None and issubclass(origin, Mapping):
        return "a dict" if args[1] is Any else f"a dict with {words(args[1])} for each name"
    return "a function" if is_function(annotation) else f"{annotation.__name__}(...)"


def bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    """The constraints of an annotated type in words."""
    for item in metadata:
        for part in item.metadata if isinstance(item, FieldInfo) else [item]:
            values = part.__dict__ if "__dict__" in dir(part) else {n: getattr(part, n) for n in part.__slots__}
            for name, value in values.items():
                if name == "min_length" and value == 1:
                    yield "that is not empty"
                elif name in BOUNDS and value is not None:
                    yield BOUNDS[name].format(value)


def kinds(annotation: Any) -> Iterator[Any]:
    """The types that a union or an annotated type is made of."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for arg in get_args(annotation):
            yield from kinds(arg)
    else:
        yield annotation


def is_function(annotation: Any) -> bool:
    """Whether a field takes a function."""
    return get_origin(annotation) is get_origin(Callable[..., Any])


def hint_of_value(value: Any, annotation: Any) -> str:
    """What was most likely meant by a value that does not fit, or the empty string."""
    choices = [choice for kind in kinds(annotation) if get_origin(kind) is Literal for choice in get_args(kind)]
    nouns = [kind for kind in kinds(annotation) if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]
    if isinstance(value, type) and value in nouns:
        return f"write {value.__name__}()"
    if isinstance(value, dict) and nouns:
        return f"write {nouns[0].__name__}(...)"
    if isinstance(value, str) and value.lower() in CONSTANTS and fits_constant(value, annotation):
        return f"write {CONSTANTS[value.lower()]}"
    if isinstance(value, str) and is_function(annotation):
        return f"give the function itself: from finetuner.dialogue.rows import {value}" if value.isidentifier() else ""
    if isinstance(value, str):
        if SYNONYMS.get(value) in choices:
            return f"did you mean {SYNONYMS[value]!r}?"
        best = get_close_matches(value, [choice for choice in choices if isinstance(choice, str)], n=1, cutoff=0.5)
        if best:
            return f"did you mean {best[0]!r}?"
        if is_number(value) and takes_number(annotation):
            return f"write {value} without quotes"
    if alone := [noun.__name__ for noun in nouns if takes_alone(noun, value)]:
        return "write " + " or ".join(f"{name}({value!r})" for name in alone)
    if isinstance(value, float) and value.is_integer() and int in kinds(annotation):
        return f"write {int(value)}"
    return ""


def fits_constant(value: str, annotation: Any) -> bool:
    return (NoneType if CONSTANTS[value.lower()] == "None" else bool) in kinds(annotation)


def takes_alone(noun: type, value: Any) -> bool:
    """Whether the noun can be made of this value alone: Steps of 3, CausalLM of "model"."""
    first, *others = dataclasses.fields(noun)
    if value is None or any(default_of(field) is dataclasses.MISSING for field in others):
        return False
    try:
        TypeAdapter(hints(noun)[first.name]).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def takes_number(annotation: Any) -> bool:
    return bool({int, float} & set(kinds(annotation)))


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def elsewhere(name: str, cls: type, nouns: Mapping[str, type]) -> str:
    """Which other noun has the field, or what it is called here: "lr belongs to AdamW"; else the empty string."""
    if name in OTHER_TOOLS:
        noun, field = OTHER_TOOLS[name]
        return f"write {field}" if noun == cls.__name__ else f"{name} is {noun}.{field}"
    homes = [noun for noun, other in nouns.items() if any(field.name == name for field in dataclasses.fields(other))]
    return f"{name} belongs to {' or '.join(homes)}" if homes else ""
