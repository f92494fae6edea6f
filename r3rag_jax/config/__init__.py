"""Configuration: every key with its bounds, and the loader of YAML recipes and `key=value` overrides."""
