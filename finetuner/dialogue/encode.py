"""A dialogue or a document -> token ids, and which of them are learned.

- The ids of a dialogue are those of `tokenizer.apply_chat_template`: its text is rendered and tokenized as a whole.
- Learned are the characters of the assistant's turns, from the first that the model writes to the token that ends the
  turn; a token is learned if all its characters are.
- An `EncoderSpec` is plain data: it travels to worker processes and has a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, processors

from finetuner.dialogue.control import Control
from finetuner.dialogue.ends import Ends, ends_of
from finetuner.dialogue.locate import structure_of, turns_directly
from finetuner.dialogue.message import Dialogue, Document, Message, RowError
from finetuner.dialogue.pretokens import pretokens_of
from finetuner.dialogue.shortcut import Shortcut, shortcut_of
from finetuner.dialogue.structure import Span, Structure
from finetuner.dialogue.template import Template
from finetuner.dialogue.texts import Texts, texts_of
from finetuner.dialogue.tokens import learned_tokens, outer_ids

Ids = npt.NDArray[np.int32]
SHAPES = 4096
"""Shapes of dialogues that are remembered; there are few, unless tools differ from row to row."""


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """All that makes an encoder, as plain data."""

    tokenizer_json: str
    """The text of tokenizer.json, new tokens included."""
    template: str | None = None
    """The Jinja source; None where there are only documents."""
    template_name: str = "chat template"
    special: tuple[tuple[str, str], ...] = ()
    """The tokenizer's special tokens by name: (("bos_token", "<s>"), ("eos_token", "</s>"))."""
    eos_id: int | None = None
    """What ends a document."""
    turns: Literal["all", "last", "split"] = "all"
    system: str | None = None
    """System message of dialogues that have none."""

    def build(self) -> Encoder:
        return Encoder(self)

    @property
    def fingerprint(self) -> str:
        """sha256 over every field, the version and the source of this floor: equal prints encode equally."""
        floor = Path(__file__).parent
        digest = hashlib.sha256()
        for file in (floor.parent / "__init__.py", *sorted(floor.glob("*.py"))):  # the first holds the version
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        values = [[field.name, getattr(self, field.name)] for field in fields(self)]
        digest.update(json.dumps(values).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids and, for each, whether it is learned as the target of the place before it."""

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    think_dropped: int = 0
    """Blocks of thinking that the template left out."""
    control: int = 0
    """Control strings that stood in the texts and were encoded as ordinary text."""


@dataclass(frozen=True, slots=True)
class Job:
    """A text to encode: for the tokenizer, or with control strings for its twin."""

    text: str
    spans: list[Span] | None
    """Learned characters; None for a document, of which all are."""
    tokens: int = 0
    """Control tokens that the result must have."""
    shortcut: Shortcut | None = None
    """The quick way to the learned tokens, where the shape has one."""
    think_dropped: int = 0
    control: int = 0


class Encoder:
    """Encodes dialogues and documents; made by `EncoderSpec.build`."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._tokenizer = tokenizer = Tokenizer.from_str(spec.tokenizer_json)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._before, self._after = outer_ids(tokenizer)
        tokenizer.post_processor = processors.Sequence([])  # the usual one trims offsets
        added = tokenizer.get_added_tokens_decoder()
        self._trimming = frozenset(number for number, token in added.items() if token.lstrip or token.rstrip)
        self._template: Template | None = None
        self._ends = Ends("", (), frozenset())
        if spec.template is not None:
            self._template = Template(spec.template, name=spec.template_name, special=dict(spec.special))
            self._ends = ends_of(self._template, [token.content for token in added.values()])
        self._control = Control(spec.tokenizer_json, tokenizer, self._ends.frame)
        self._shapes: dict[Hashable, tuple[Structure, Shortcut | None]] = {}
        self._pretokens = pretokens_of(spec.tokenizer_json, tokenizer)

    def encode(self, items: Sequence[Dialogue | Document]) -> list[list[Encoded] | RowError]:
        """What each item becomes: one `Encoded` (several under turns="split"), or the reason why it cannot.

        The whole batch is tokenized together.
        """
        jobs: list[list[Job] | RowError] = []
        for item in items:
            try:
                jobs.append(self._jobs(item))
            except RowError as error:
                jobs.append(error)
        flat = [job for entry in jobs if not isinstance(entry, RowError) for job in entry]
        encodings = iter(self._encodings(flat))
        done: list[list[Encoded] | RowError] = []
        for entry in jobs:
            if isinstance(entry, RowError):
                done.append(entry)
                continue
            found = [(job, next(encodings)) for job in entry]
            try:
                done.append([self._encoded(job, encoding) for job, encoding in found])
            except RowError as error:
                done.append(error)
        return done

    def _encodings(self, jobs: Sequence[Job]) -> list[Encoding | Ids]:
        """The jobs' texts tokenized in three calls: to ids alone, with offsets, by the twin."""
        ways = [2 if job.control else 1 if job.spans is not None and job.shortcut is None else 0 for job in jobs]
        batches = [[job.text for job, way in zip(jobs, ways, strict=True) if way == number] for number in range(3)]
        exact = self._tokenizer.encode_batch(batches[1], add_special_tokens=False)
        twin = self._control.twin.encode_batch(batches[2], add_special_tokens=False) if batches[2] else []
        done: list[Iterator[Encoding | Ids]] = [iter(self._ids(batches[0])), iter(exact), iter(twin)]
        return [next(done[way]) for way in ways]

    def _ids(self, texts: list[str]) -> list[Ids]:
        """The ids of whole texts: word by word from memory where that is the quicker way."""
        if self._pretokens is not None:
            found = self._pretokens.encode(texts)
            if found is not None:
                return found
            self._pretokens = None
        done = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in done]

    def _jobs(self, item: Dialogue | Document) -> list[Job]:
        """The texts that an item becomes."""
        if isinstance(item, Document):
            refuse_half_characters(item.text)
            return [Job(item.text, None, control=len(self._control.pattern.findall(item.text)))]
        if self._template is None:
            raise RowError("type", "a dialogue needs a chat template", found="a dialogue", fits="a document")
        if self.spec.system is not None and item.messages[:1] and item.messages[0].role != "system":
            item = replace(item, messages=(Message("system", self.spec.system), *item.messages))
        learned = [number for number, message in enumerate(item.messages) if message.is_learned]
        for number in learned:
            if item.messages[number].role != "assistant":
                reason = "only what the assistant says can be learned"
                raise RowError("role", reason, found=item.messages[number].role, fits="assistant")
        if not learned:
            raise RowError("no-target", "no message of the row is learned", fits="at least one assistant message")
        match self.spec.turns:
            case "all":
                return [self._job(self._template, item, tuple(learned))]
            case "last":
                return [self._job(self._template, item, (learned[-1],))]
            case "split":
                parts = [(replace(item, messages=item.messages[: number + 1]), (number,)) for number in learned]
                return [self._job(self._template, part, only) for part, only in parts]

    def _job(self, template: Template, dialogue: Dialogue, learned: tuple[int, ...]) -> Job:
        """The rendered text of a dialogue with the characters to learn."""
        text = template.render(dialogue)
        refuse_half_characters(text)
        control, masked, texts = 0, text, texts_of(dialogue)
        if self._control.spoken(texts):
            dialogue, control = self._control.masked(dialogue)
            masked, texts = template.render(dialogue), texts_of(dialogue)
            if self._control.unmasked(masked) != text:
                raise RowError("control", "the template changes the control strings that the row has in its texts")
        structure, shortcut = self._shape(template, texts, learned)
        spans = structure.spans(masked, texts.texts)
        if spans is None:
            shortcut, spans = None, turns_directly(template, dialogue, masked, structure.messages, self._ends)
        if not spans:
            reason = "the template leaves out the thinking of every turn to learn"
            raise RowError("no-target", reason, fits="turns='split' keeps the thinking of each turn")
        if control:
            twin = self._control.twin_text(masked, spans)
            return Job(twin.text, twin.spans, twin.tokens, None, structure.dropped, control)
        tokens = len(self._control.pattern.findall(text)) if shortcut is None else shortcut.controls
        return Job(text, spans, tokens, shortcut, structure.dropped)

    def _shape(self, template: Template, texts: Texts, learned: tuple[int, ...]) -> tuple[Structure, Shortcut | None]:
        """What is known of all dialogues of this shape; of this one alone where the template takes arguments apart."""
        key = (texts.shape, learned)
        known = self._shapes.get(key)
        if known is not None:
            return known
        structure, shared = structure_of(template, texts, learned, self._ends)
        shortcut = shortcut_of(structure, self._control.pattern, self._tokenizer, self._control.unknown_ids)
        if shared:
            if len(self._shapes) >= SHAPES:
                self._shapes.clear()
            self._shapes[key] = structure, shortcut
        return structure, shortcut

    def _encoded(self, job: Job, encoding: Encoding | Ids) -> Encoded:
        """The ids of an encoded text with their marks; checks that control tokens are the template's own."""
        if not isinstance(encoding, Encoding):
            ids_T = encoding
        elif job.control:
            ids_T = self._control.own_ids(encoding)
        else:
            ids_T = np.array(encoding.ids, dtype=np.int32)
        if job.spans is None:
            return self._document(ids_T, job)
        controls = self._control.places(ids_T)
        if job.tokens != len(controls):
            raise RowError("control", "the tokenizer does not make the control tokens that the template writes")
        learned_T = None if job.shortcut is None else job.shortcut.learned(ids_T, controls)
        if learned_T is None:
            if not isinstance(encoding, Encoding):
                encoding = self._tokenizer.encode(job.text, add_special_tokens=False)
            learned_T = learned_tokens(encoding, job.spans, self._trimming)
        if not learned_T[1:].any():
            raise RowError("no-target", "no token of the row is learned", fits="an assistant message that is not empty")
        return Encoded(ids_T, learned_T, job.think_dropped, job.control)

    def _document(self, ids_T: npt.NDArray[np.int32], job: Job) -> Encoded:
        """A document between the tokenizer's own first and last tokens, ended once."""
        if not len(ids_T):
            raise RowError("empty", "the text has no tokens")
        end = [] if self.spec.eos_id is None or self._after[-1:] == [self.spec.eos_id] else [self.spec.eos_id]
        whole_T = np.concatenate([np.array(self._before, np.int32), ids_T, np.array(self._after + end, np.int32)])
        learned_T = np.ones(len(whole_T), dtype=np.bool_)
        learned_T[: len(self._before)] = False
        return Encoded(whole_T, learned_T, control=job.control)


def refuse_half_characters(text: str) -> None:
    """Refuses lone surrogates, which JSON can spell (a cut "\\ud83d") and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise RowError("half-character", "the row has half a character", found, "whole characters") from None
