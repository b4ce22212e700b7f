"""Run the command line as ``python -m fastce``."""

import sys

from fastce.cli import main

sys.exit(main())
