"""Text and token ids: tokenizer, chat templates, the two protocols, prompts, transcripts."""
