"""What each metric of `metrics.jsonl` means, in which unit: for the terminal, the report and docs/reports.md."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """What a metric is."""

    unit: str  # "" for a plain number
    text: str
    phases: str = "rl"


TIME_PARTS = {  # metric -> its name in the split of an iteration's time, in the order of the iteration
    "prefill_s": "prefill",
    "decode_s": "decode",
    "search_wait_s": "waiting for search",
    "score_s": "scoring",
    "update_s": "update",
    "eval_s": "evaluation",
    "checkpoint_s": "checkpoint",
}
GLOSSARY = {
    # ---- both phases
    "time_s": Meaning("s", "since this process began", "sft, rl"),
    "tokens_per_s": Meaning("tokens/s", "trained on, over the whole step or iteration; prompts and passages included",
                            "sft, rl"),
    "loss": Meaning("", "of the updates; in the cold start nats per token", "sft, rl"),
    "grad_norm": Meaning("", "norm of the gradient before clipping", "sft, rl"),
    "mfu": Meaning("share", "model FLOPs of updates over what the devices could do; only on known chips", "sft, rl"),
    "accuracy": Meaning("share", "tokens that were the likeliest ones", "sft"),
    # ---- rewards and answers
    "reward": Meaning("", "mean reward of a trajectory; the parts below add up to it"),
    "reward_outcome": Meaning("", "part of the reward: right or wrong answer"),
    "reward_process": Meaning("", "part of the reward: relevant passages found"),
    "reward_format": Meaning("", "part of the reward: malformed steps"),
    "reward_no_answer": Meaning("", "part of the reward: no answer"),
    "relevance": Meaning("", "mean process reward of a search, before shaping"),
    "em": Meaning("share", "rollouts with an exact match, at the training temperature"),
    "f1": Meaning("share", "word overlap of rollouts with the gold answer"),
    "acc": Meaning("share", "rollouts that are right according to the judge"),
    "dev_em": Meaning("share", "dev questions with an exact match, greedily"),
    "no_answer_rate": Meaning("share", "trajectories that ran out of steps or tokens"),
    "context_full_rate": Meaning("share", "trajectories whose context was full"),
    "format_error_rate": Meaning("share", "trajectories that end with a malformed step"),
    "repeated_query_rate": Meaning("share", "queries that occur earlier in their trajectory"),
    "trajectory_tokens": Meaning("tokens", "sampled in a trajectory"),
    "mean_retrievals": Meaning("searches", "per question"),
    "judge_failure_rate": Meaning("share", "judgements that failed"),
    "judge_known_rate": Meaning("share", "judgements that were known before"),
    "left_out": Meaning("share", "trajectories left out because a judgement failed"),
    # ---- updates
    "policy_loss": Meaning("", "the algorithm's policy loss"),
    "value_loss": Meaning("", "of the critic"),
    "value": Meaning("", "mean value of the critic"),
    "explained_variance": Meaning("share", "of the returns, by the critic"),
    "kl": Meaning("nats/token", "from the policy that RL began from, of the sampled tokens (k1)"),
    "kl_loss": Meaning("nats/token", "the KL penalty in the loss, by its own estimator"),
    "kl_weight": Meaning("", "coefficient of the KL, where it is adapted"),
    "entropy": Meaning("nats/token", "of the policy"),
    "clip_fraction": Meaning("share", "tokens whose ratio is clipped"),
    "approx_kl": Meaning("nats/token", "between the policy that sampled and the updated one (k3)"),
    "displacement": Meaning("nats/token", "mean log-ratio of tokens with a positive advantage"),
    "weight": Meaning("", "mean importance weight, where ratios are truncated"),
    "truncated_fraction": Meaning("share", "tokens whose importance weight is truncated"),
    "sampler_gap": Meaning("nats", "largest difference of sampler and trainer on a token, before the first update"),
    "overlong_penalty": Meaning("", "mean penalty of long trajectories"),
    "fill": Meaning("share", "tokens of the batches that are no padding"),
    "learnt_from": Meaning("share", "trajectories that are trained on"),
    "equal_groups": Meaning("share", "questions all of whose samples earned the same"),
    "bad_steps": Meaning("updates", "that were not finite"),
    # ---- time
    "iteration_s": Meaning("s", "the iteration, without its checkpoint"),
    "rollout_wait_s": Meaning("s", "waiting for trajectories; if they were prefetched, less than sampling them took"),
    "rollout_s": Meaning("s", "until the trajectories were sampled and scored"),
    "prefill_s": Meaning("s", "reading prompts and passages into the cache"),
    "decode_s": Meaning("s", "sampling tokens; with an inference server all waiting for it"),
    "search_wait_s": Meaning("s", "that sampling stood still for searches"),
    "score_s": Meaning("s", "rewards, the judge included"),
    "update_s": Meaning("s", "forward passes, advantages and updates"),
    "eval_s": Meaning("s", "the dev questions"),
    "checkpoint_s": Meaning("s", "writing the checkpoint before this iteration"),
    "eta_s": Meaning("s", "until RL is done, at the mean pace so far"),
    "decoded_per_s": Meaning("tokens/s", "sampled, over `decode_s`"),
    "memory_bandwidth": Meaning("share", "of the memory bandwidth that decoding uses, for weights in each step and "
                                "attended positions; only on known chips"),
    "search_p50_s": Meaning("s", "median of a batched search"),
    "search_p95_s": Meaning("s", "95th percentile of a batched search"),
    "search_failures": Meaning("requests", "to search servers that failed and were repeated"),
    "staleness": Meaning("iterations", "between the policy that sampled and the one that is updated; 1 if prefetched"),
    "num_compiled": Meaning("programs", "compiled, or read from the compile cache"),
}  # fmt: skip
