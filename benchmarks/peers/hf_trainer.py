"""transformers' Trainer as its guides use it: apply_chat_template with masks through datasets.map, padded batches."""

from __future__ import annotations

import time
from typing import Any

from shared import Report, listener, read, task, trainer_settings

given, report = task(), Report()


def main() -> None:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        done = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        labels = [token if on else -100 for token, on in zip(done["input_ids"], done["assistant_masks"])]
        return {"input_ids": done["input_ids"], "labels": labels}

    rows = Dataset.from_list(read(given.rows))
    begin = time.time()
    rows = rows.map(encode, remove_columns=rows.column_names)
    report.extra["encode_seconds"] = time.time() - begin
    if given.job == "train":
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32")
        trainer = Trainer(
            model, TrainingArguments(**trainer_settings(given)), train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[listener(report)],
        )  # fmt: skip
        trainer.train()
    report.tell()


main()
