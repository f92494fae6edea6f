"""Models: the decoder, text encoders, LoRA, and reading and writing Hugging Face files."""
