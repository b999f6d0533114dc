"""`python -m treespec`: the same as the `treespec` command."""

import sys

from treespec.cli import main

sys.exit(main())
