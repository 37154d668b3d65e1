"""The command line: one file per command, which parses, calls and shows. Data goes to stdout, words to stderr."""

from grc.cli.app import main

__all__ = ["main"]
