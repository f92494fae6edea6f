"""Text and token ids: tokenizer, chat templates, trajectory protocols, prompts, transcripts."""
