"""The command line: `llmrs run`, `chat`, `graph`."""

from llmrs.cli.app import main

__all__ = ["main"]
