"""`python -m tune_sparse` is the command `tune-sparse`."""

import sys

from tune_sparse.cli import main

sys.exit(main())
