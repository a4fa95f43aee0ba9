"""The decide process: the socket, asks first, and what it keeps beside it."""
