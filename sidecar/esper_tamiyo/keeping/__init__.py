"""State that survives a restart: the engine's, saved to files as it changes."""
