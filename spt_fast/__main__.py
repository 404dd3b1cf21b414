"""`python -m spt_fast` is `spt-fast`."""

import sys

from spt_fast.commands.main import main

sys.exit(main())
