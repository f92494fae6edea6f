"""Reading and writing models in Hugging Face directories, and reading GGUF files."""
