"""LLaMA-Factory's supervised fine-tuning: its own template, preparation and trainer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

os.environ |= {"DISABLE_VERSION_CHECK": "1"}

from shared import Report, absent, listener, task, trainer_settings

absent("torchaudio", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")

given, report = task(), Report()


def main() -> None:
    place = Path(given.out) / "data"
    place.mkdir(parents=True, exist_ok=True)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages"}
    entry = {"file_name": given.rows, "formatting": "sharegpt", "columns": columns, "tags": tags}
    (place / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    settings = {
        **trainer_settings(given), "stage": "sft", "do_train": True, "model_name_or_path": given.model,
        "dataset": "rows", "dataset_dir": str(place), "template": "chatml",
        "finetuning_type": "full", "cutoff_len": given.length,
        "flash_attn": "sdpa", "disable_gradient_checkpointing": True, "overwrite_cache": True, "report_to": "none",
        "preprocessing_num_workers": 1,
    }  # fmt: skip
    if given.job == "encode":
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.hparams import get_train_args
        from llamafactory.model import load_tokenizer

        model_args, data_args, training_args, _, _ = get_train_args(settings)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        begin = time.time()
        get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
        report.extra["encode_seconds"] = time.time() - begin
    else:
        from llamafactory.train.tuner import run_exp

        run_exp(settings, callbacks=[listener(report)])
    report.tell()


main()
