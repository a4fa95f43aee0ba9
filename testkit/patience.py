"""How long tests wait for what is sure to come."""

PATIENCE_S = 280.0
"""More than it takes on a machine whose processors fifteen others want as well, and less than a
test has, so that the one who waited says for what. Nobody waits so long where all is well."""
