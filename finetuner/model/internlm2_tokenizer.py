"""InternLM2's tokenizer of its SentencePiece file, in the form of the tokenizers library.

- Pieces and their scores make a BPE: of two pieces that can be joined, those whose joint piece scores best go first.
- Tokens that tokenizer_config.json places at an id take the place of the unused piece there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from finetuner.errors import ModelError, Problem
from finetuner.model import folder as files

NAMES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4
"""Kinds of pieces (SentencePiece.Type of sentencepiece_model.proto)."""


def is_tokenizer(settings: Mapping[str, Any]) -> bool:
    """Whether tokenizer_config.json is an InternLM2's."""
    return str(settings.get("tokenizer_class")) in NAMES


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, of tokenizer.json or of tokenizer.model.

    Raises: ModelError.
    """
    settings = files.read_json(folder / "tokenizer_config.json")
    named = {name: word(settings[name]) for name in SPECIAL if settings.get(name)}
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    elif (folder / "tokenizer.model").exists():
        proto = parse(folder / "tokenizer.model")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=from_pieces(proto, settings, named), **named)
    else:
        raise ModelError(
            Problem(
                "E-TOKENIZER",
                "the tokenizer's files are missing",
                str(folder),
                fits="tokenizer.json or tokenizer.model",
                remedy="fetch the model again",
            )
        )
    template = folder / "chat_template.jinja"
    tokenizer.chat_template = template.read_text("utf-8") if template.exists() else settings.get("chat_template")
    tokenizer.name_or_path = str(folder)
    return tokenizer


def word(token: Any) -> str:
    """A special token's text, which tokenizer_config.json holds bare or in an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def parse(file: Path) -> Any:
    """The SentencePiece model in `file`.

    Raises: ModelError where protobuf is missing or the file is damaged.
    """
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
        from transformers.convert_slow_tokenizer import import_protobuf

        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise ModelError(
            Problem(
                "E-TOKENIZER",
                "tokenizer.model is read with protobuf, which is not installed",
                str(file),
                remedy="pip install protobuf",
            )
        ) from error
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ModelError(
            Problem("E-TOKENIZER", "tokenizer.model is damaged", str(file), str(error), remedy="fetch the model again")
        ) from error
    return proto


def from_pieces(proto: Any, settings: Mapping[str, Any], named: Mapping[str, str]) -> Tokenizer:
    """The tokenizer of a SentencePiece BPE."""
    added = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    words = [word(added[number]) if number in added else piece.piece for number, piece in enumerate(proto.pieces)]
    vocabulary = {text: number for number, text in enumerate(words)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = joins(scores, vocabulary)
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    prefix = proto.normalizer_spec.add_dummy_prefix
    built.normalizer = normalizers.Sequence(
        [*steps, *([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1)] if prefix else []),
        ]
    )
    placed = [(number, word(token), bool(token.get("special", True))) for number, token in added.items()]
    placed += [
        (number, piece.piece, piece.type == CONTROL)
        for number, piece in enumerate(proto.pieces)
        if piece.type in (CONTROL, USER) and number not in added
    ]
    for _, text, special in sorted(placed):
        built.add_tokens([AddedToken(text, normalized=False, special=special)])
    if settings.get("add_bos_token", True) and "bos_token" in named:
        start = named["bos_token"]
        built.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, vocabulary[start])]
        )
    return built


def joins(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best score first."""
    found = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
