"""One module per command of ``esper-otel``.

Each has ``add``, which describes the command to the parser, and imports what it needs
only when it runs: a tool that people type all day must be quick.
"""
