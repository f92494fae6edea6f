"""The targets of `python -m tests.fuzz`, with the share of the cases that each gets: by what a case costs."""

from __future__ import annotations

from tests.fuzz import files, replies, texts
from tests.fuzz.target import Target

TARGETS = (
    Target("protocols", 300, texts.open_protocols),
    Target("transcripts", 40, texts.open_transcripts),
    Target("templates", 8, texts.open_templates),
    Target("verdicts", 150, texts.open_verdicts),
    Target("json", 130, texts.open_json),
    Target("questions", 90, files.open_questions),
    Target("passages", 70, files.open_passages),
    Target("trajectories", 50, files.open_trajectories),
    Target("configuration", 10, files.open_config),
    Target("model configs", 80, files.open_model_configs),
    Target("weights", 40, files.open_weights),
    Target("tokenizers", 30, files.open_tokenizers),
    Target("tokenizer kinds", 10, files.open_tokenizer_kinds),
    Target("encoder files", 40, files.open_encoder_files),
    Target("indexes", 30, files.open_indexes),
    Target("search replies", 40, replies.open_search_replies),
    Target("chat replies", 40, replies.open_chat_replies),
    Target("completion replies", 50, replies.open_completion_replies),
    Target("embedding replies", 40, replies.open_embedding_replies),
    Target("server bodies", 30, replies.open_server_bodies),
)
