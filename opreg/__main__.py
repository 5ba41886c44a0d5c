"""`python -m opreg` is the `opreg` command."""

import sys

from .cli import main

sys.exit(main())
