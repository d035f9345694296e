"""`finetuner train` for torchrun: torchrun --nproc-per-node 8 tools/train.py CONFIG [field=value ...]"""

import sys

from finetuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
