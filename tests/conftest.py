"""What holds for all tests."""

import signal

from hypothesis import settings

# A shell that puts a job in the background has it ignore SIGINT, and so would every process
# that a test starts and means to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")
