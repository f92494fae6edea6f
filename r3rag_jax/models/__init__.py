"""Models: the decoder, text encoders, LoRA, and Hugging Face files in and out."""
