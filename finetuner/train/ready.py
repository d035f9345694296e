"""What the steps of a run need, made in two stages: the material, known before a weight is loaded, and the engine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetuner.config.data import Data, Dialogues, Mix
from finetuner.config.model import Fresh
from finetuner.config.run import Run
from finetuner.data.packs import pack_samples
from finetuner.data.samples import Samples, prepare
from finetuner.data.steps import Plan
from finetuner.engine.build import build_engine, shards_for
from finetuner.engine.engine import Engine
from finetuner.model.build import build, checked_tokenizer
from finetuner.model.folder import model_folder
from finetuner.model.identity import base_identity
from finetuner.model.joint import tell_joined_prompt
from finetuner.model.tokenizer import add_tokens, encoder_spec
from finetuner.runtime.log import say
from finetuner.runtime.ranks import is_main
from finetuner.runtime.seed import seed_all
from finetuner.train.progress import Counting


@dataclass(frozen=True, slots=True)
class Material:
    """What is learned from, and in which order."""

    samples: Samples
    held: Samples | None
    """Held out for validation."""
    plan: Plan
    identity: str
    """Of the samples."""
    base: str | None
    """Identity of the base's weights; None for a fresh model."""


@dataclass(slots=True)
class Clock:
    """Seconds that each stage of a run took."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def ends(self, stage: str) -> None:
        """`stage` began when the one before it ended, and ends now."""
        now = time.monotonic()
        self.seconds[stage], self._since = round(now - self._since, 3), now


def gather(run: Run) -> Material:
    """The material of a run, read, checked and counted."""
    tokenizer = checked_tokenizer(run.model, run.data.length, dialogues=has_dialogues(run.data))
    add_tokens(tokenizer, run.model.new_tokens)
    samples, held = data_of(run, tokenizer)
    if has_dialogues(run.data):
        tell_joined_prompt(tokenizer)
    plan = Plan(pack_samples(samples, seed=run.seed), run.batch.total, run.until, run.seed)
    base = None if isinstance(run.model.path, Fresh) else base_identity(model_folder(run.model))
    return Material(samples, held, plan, identity_of(samples), base)


def engine_of(run: Run, device: torch.device) -> Engine:
    """The engine with its model on `device`; says what is held in what, and what trains."""
    seed_all(run.seed)
    tokens = run.data.length * run.batch.per_device
    shards = shards_for(run, device)
    learner = build(run.model, device, dialogues=has_dialogues(run.data), tokens=tokens, shards=shards).learner
    say("; ".join(f"{part}: {kind}" for part, kind in learner.dtype_table()))
    trains = learner.what_trains()
    say(f"{trains.trained:,} of {trains.all:,} parameters train")
    return build_engine(run, learner, device)


def data_of(run: Run, tokenizer: Any) -> tuple[Samples, Samples | None]:
    """What is learned from, and what is held out for validation."""
    spec = encoder_spec(tokenizer)
    with contextlib.closing(Counting()) as counting:
        given = functools.partial(
            prepare, spec=spec, cache=cache_folder(), seed=run.seed, progress=counting if is_main() else None
        )
        samples = given(run.data)
        if run.eval is None:
            return samples, None
        if run.eval.fraction is not None:
            return samples.hold_out(run.eval.fraction, run.seed)
        assert run.eval.data is not None
        return samples, given(run.eval.data)


def has_dialogues(data: Data) -> bool:
    """Whether any part needs a chat template."""
    parts = [part for part, _ in data.parts] if isinstance(data, Mix) else [data]
    return any(isinstance(part, Dialogues) for part in parts)


def identity_of(samples: Samples) -> str:
    """What tells these samples from any others: the checksums of the encoded data sets, and which of it is learned."""
    parts = samples.report.get("parts", [samples.report])
    digest = hashlib.sha256("+".join(sha for part in parts for sha in part["samples_sha256"]).encode())
    for bounds in (samples.starts, samples.stops):
        digest.update(bounds.tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where encoded samples are kept for all runs of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "finetuner" / "samples"
