"""``python -m esper_otel`` is ``esper-otel``, and with a script ``esper-otel run``.

The second is for launchers that start a module: ``torchrun -m esper_otel train.py``, or
``torchrun -m esper_otel -m package.module``.
"""

import sys

from esper_otel.cli import COMMANDS, main

arguments = sys.argv[1:]
if arguments and arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
    arguments = ["run", *arguments]
sys.exit(main(arguments))
