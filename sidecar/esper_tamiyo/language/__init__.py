"""What a table of thresholds can say, and reading one from YAML."""
