"""What survives a restart: the state of the engine, kept in files as it changes."""
