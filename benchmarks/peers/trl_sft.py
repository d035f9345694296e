"""TRL's SFTTrainer: its own preparation of conversations and its own training."""

from __future__ import annotations

import time

from shared import Report, listener, read, task, trainer_settings

given, report = task(), Report()


def main() -> None:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    config = SFTConfig(
        **trainer_settings(given),
        max_length=given.length,
        packing=False,
        assistant_only_loss=True,
        shuffle_dataset=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32")
    rows = Dataset.from_list(read(given.rows))
    begin = time.time()
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[listener(report)])
    report.extra["encode_seconds"] = time.time() - begin
    if given.job == "train":
        trainer.train()
    report.tell()


main()
