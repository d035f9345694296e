"""Ready runs, a file each; `finetuner list` shows them. Files whose names begin with _ are parts of them."""
