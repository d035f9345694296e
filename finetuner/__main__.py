"""`python -m finetuner`."""

from finetuner.cli.main import main

raise SystemExit(main())
