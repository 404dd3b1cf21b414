"""`python -m spt_fast` is `spt-fast`."""

import sys

from spt_fast.cli import main

sys.exit(main())
