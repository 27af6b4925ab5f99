"""The command line: `llmrs run`, `chat`, `graph`, `bench`, `list`."""

from llmrs.cli.app import main

__all__ = ["main"]
