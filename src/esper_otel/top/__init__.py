"""Top: runs on a terminal while they train, from Tamiyo or from recordings.

:mod:`~esper_otel.top.watched` is what is known of runs, wherever it comes from;
:mod:`~esper_otel.top.picture` draws it as rows of text, and
:mod:`~esper_otel.top.screen` shows these.
"""
