"""Questions answered along the run, to see what it learns; without effect on the training that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuner.config.run import Ask
from finetuner.generate.answer import answer
from finetuner.generate.stops import stop_ids
from finetuner.model.causal_lm import CausalLearner
from finetuner.runtime import dist
from finetuner.runtime.log import say
from finetuner.runtime.ranks import is_main


def ask_all(ask: Ask, learner: CausalLearner, tokenizer: Any, step: int, folder: Path) -> None:
    """Says the answers and writes them to `folder`/samples/step-N.txt.

    The main rank answers while the others wait; where each holds a shard of the weights, all answer, in step.
    """
    if is_main() or learner.together:
        stops = stop_ids(tokenizer, learner.model.generation_config)
        lines = []
        for prompt in ask.prompts:
            system = [{"role": "system", "content": ask.system}] if ask.system else []
            messages = [*system, {"role": "user", "content": prompt}]
            with learner.uncompiled(), learner.whole():
                given = answer(
                    learner.model, tokenizer, messages, max_tokens=ask.max_tokens, stops=stops, compute=learner.compute
                )
            end = "" if given.stopped == "stop" else f" [cut at {ask.max_tokens} tokens]"
            lines.append(f"> {prompt}\n{given.text}{end}\n")
            say(f"step {step}  asked: {prompt}\n  {given.text}{end}")
    if is_main():
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / f"step-{step}.txt").write_text("\n".join(lines), encoding="utf-8")
    dist.barrier()
