"""The decide process: the socket, decision requests first, and its companions."""
