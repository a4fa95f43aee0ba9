"""Recordings through the very same engine: replay, compare, tests of tables."""
