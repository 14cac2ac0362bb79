"""`python -m bertscale` is the `bertscale` command."""

import sys

from bertscale.cli import main

sys.exit(main())
