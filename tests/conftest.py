"""What holds for all tests."""

import signal

# A shell that puts a job in the background has it ignore SIGINT, and so would every process
# that a test starts and means to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
