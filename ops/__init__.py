"""What serves the repository and is not in the wheel: generated files, and the native stack."""
