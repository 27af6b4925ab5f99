"""`python -m llmrs.cli`, the same as `llmrs`."""

import sys

from llmrs.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
