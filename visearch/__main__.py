"""``python -m visearch`` is the command line."""

import sys

from visearch.cli import main

sys.exit(main())
