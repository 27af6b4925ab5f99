"""The command line: `llmrs run`, `chat`, `graph`, `list`."""

from llmrs.cli.app import main

__all__ = ["main"]
