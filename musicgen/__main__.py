"""`python -m musicgen` is the command `musicgen`."""

import sys

from musicgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
