"""`python -m llmrs.cli`, which is `llmrs`."""

import sys

from llmrs.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
