"""Modules of the commands of ``tamiyo``, by what the commands are about.

Each command has an ``add_…``, which describes it to the parser, and its module imports what it
needs only when it runs: a tool that people type all day must be quick.
"""
