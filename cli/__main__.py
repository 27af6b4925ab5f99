"""`python -m llmrs.cli`, which is `llmrs`."""

import sys

from llmrs.cli.app import main

sys.exit(main())
