"""``python -m quantlib`` is the ``quantlib`` command."""

import sys

from quantlib.cli import main

sys.exit(main())
