"""`python -m heedful`: the same as the command `heedful`."""

import sys

from heedful.cli import main

if __name__ == "__main__":
    sys.exit(main())
