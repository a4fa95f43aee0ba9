"""What a garden raises when it is asked for something that cannot be."""


class GardenError(ValueError):
    """Something a garden was asked for that cannot be; says what was expected."""
