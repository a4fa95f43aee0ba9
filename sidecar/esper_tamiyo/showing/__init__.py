"""The page of the sidecar: the runs that it knows, live, in a browser or for Prometheus."""
