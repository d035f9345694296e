#!/usr/bin/env bash
# The quickstart's commands, one after the other; run by `make quickstart` from the top of the checkout.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1
HERE=examples/quickstart
WORK=work_dirs/quickstart

step() { printf '\n== %s\n' "$1"; }

step "1 of 6: a tokenizer from our texts"
[ -f "$WORK/tokenizer/tokenizer.json" ] || python "$HERE/tokenizer.py" "$WORK/tokenizer"

step "2 of 6: a tiny model learns to write, from nothing"
finetuner train "$HERE/base.py"

step "3 of 6: it is asked"
finetuner chat "$WORK/base/last" --ask "Who are you?" --ask "What does a duck say?" | tee "$WORK/before.txt"

step "4 of 6: it learns who it is, through LoRA"
finetuner train "$HERE/assistant.py"

step "5 of 6: the adapter is merged into the model"
rm -rf "$WORK/merged"
finetuner merge "$WORK/assistant/last" "$WORK/merged"

step "6 of 6: it is asked again"
finetuner chat "$WORK/merged" --ask "Who are you?" --ask "What does a duck say?" | tee "$WORK/after.txt"

python "$HERE/check.py" "$WORK"
