"""The embedded fictional encyclopedia and the bundled base model."""
