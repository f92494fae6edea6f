"""A warning, before anything is rolled out, that passages at their limits leave no space for the last step."""

from __future__ import annotations

from r3rag_jax.config import Config


def context_notices(config: Config) -> list[str]:
    """What a user should know of `rollout.max_length` before a run, as rich markup; empty: the passages fit.

    The context of the last step holds the prompt, the earlier steps, and the passages of `max_steps - 1` searches. The
    notice is given where these passages, each of `retrieval.passage_tokens`, leave less than `max_new_tokens`.
    """
    rollout, retrieval = config.rollout, config.retrieval
    num_searches = rollout.max_steps - 1
    num_passages = min(num_searches * retrieval.top_k, retrieval.max_passages)
    num_tokens = num_passages * retrieval.passage_tokens
    if num_tokens + rollout.max_new_tokens <= rollout.max_length:
        return []
    rule = (
        f"rollout.max_length={rollout.max_length} cannot hold a trajectory at its limits: {num_searches} searches "
        f"(rollout.max_steps={rollout.max_steps}) x retrieval.top_k={retrieval.top_k}, at most "
        f"retrieval.max_passages={retrieval.max_passages}, x retrieval.passage_tokens={retrieval.passage_tokens} are "
        f"{num_tokens} tokens of passages, beside the prompt and up to {rollout.max_new_tokens} tokens a step "
        "(rollout.max_new_tokens). Trajectories that fill their context end without an answer (CONTEXT_FULL)"
    )
    enough = num_tokens + rollout.max_steps * rollout.max_new_tokens
    return [f"[yellow]{rule}; {enough} tokens and those of the prompt would hold it[/]"]
