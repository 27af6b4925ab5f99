"""`python -m llmrs`."""

import sys

from llmrs.cli import main

if __name__ == "__main__":
    sys.exit(main())
