"""XTuner 0.2's data pipeline: its passes from rows to packed ids and labels."""

from __future__ import annotations

import time

from shared import Report, absent, read, task

absent("torchvision", "torchvision.transforms", "torchvision.transforms.functional")

given, report = task(), Report()


def main() -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from xtuner.dataset.huggingface import process
    from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.bos_token = tokenizer.eos_token  # it takes no tokenizer without one, except Qwen's
    rows = Dataset.from_list(read(given.rows))
    begin = time.time()
    process(
        rows, tokenizer=tokenizer, max_length=given.length, dataset_map_fn=openai_map_fn,
        template_map_fn={"type": template_map_fn_factory, "template": PROMPT_TEMPLATE.qwen_chat},
        remove_unused_columns=True, shuffle_before_pack=False, pack_to_max_length=True, map_num_proc=1,
        use_varlen_attn=False,
    )  # fmt: skip
    report.extra["encode_seconds"] = time.time() - begin
    report.tell()


main()
