"""`python -m musicgen` runs the `musicgen` command."""

import sys

from musicgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
