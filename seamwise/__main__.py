"""`python -m seamwise …`: the command line, where the installed script is not at hand."""

import sys

from seamwise.runtime.serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
