"""Scripts that start from nothing, and need not wait for torch's compiler."""

SOURCE = """
import sys
from types import SimpleNamespace
if "torch" not in sys.modules:
    sys.modules["torch._dynamo"] = SimpleNamespace(
        disable=lambda function, *_, **__: function,
        graph_break=lambda: None,
        trace_rules=SimpleNamespace(clear_lru_cache=lambda: None),
    )
    sys.modules["torch._meta_registrations"] = SimpleNamespace()
"""
"""The head of a script. The first optimizer of a process imports the compiler, which takes two
seconds, and only asks not to be compiled. What computes tensors without data takes torch a
fifth of its import, and nobody here has any. Where torch is there already, so are both."""
