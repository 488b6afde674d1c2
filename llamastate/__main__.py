"""``python -m llamastate``: the same as ``llamastate``."""

import sys

from llamastate.cli import main

sys.exit(main())
