"""The language of threshold tables, and reading one from YAML."""
