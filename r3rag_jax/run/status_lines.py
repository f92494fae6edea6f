"""What a terminal shows of an RL iteration while a run goes."""

from __future__ import annotations

from collections.abc import Mapping

from r3rag_jax.run.glossary import TIME_PARTS

Metrics = Mapping[str, float]
REWARD_PARTS = {
    "reward_outcome": "answer", "reward_process": "passages", "reward_format": "format",
    "reward_no_answer": "no answer",
}  # fmt: skip


def summary(metrics: Metrics) -> dict[str, float]:
    """The numbers beside the progress bar."""
    shown = {"reward": metrics["reward"], "em": 100 * metrics["em"]}
    if "dev_em" in metrics:
        shown["dev_em"] = 100 * metrics["dev_em"]
    return shown | {"tokens_per_s": metrics["tokens_per_s"]}


def live_lines(metrics: Metrics) -> list[str]:
    """Lines below the bar: parts of the reward, searches, the devices, and where the time went. What is missing is not
    shown."""
    parts = [f"{name} {metrics[key]:+.2f}" for key, name in REWARD_PARTS.items() if metrics.get(key)]
    lines = {
        "reward": " ".join(parts),
        "search": _join(
            _of(metrics, "mean_retrievals", "{:.2f} per question"),
            _of(metrics, "search_p50_s", "p50 {:.0f} ms", 1000),
            _of(metrics, "search_p95_s", "p95 {:.0f} ms", 1000),
            f"{metrics['search_failures']:.0f} failed" if metrics.get("search_failures") else "",
        ),
        "policy": _join(
            _of(metrics, "entropy", "entropy {:.3f}"),
            _of(metrics, "kl", "KL {:z.4f}"),
            f"{metrics['staleness']:.0f} iteration stale" if metrics.get("staleness") else "",
        ),
        "device": _join(
            _of(metrics, "decoded_per_s", "decodes {:,.0f} tokens/s"),
            _of(metrics, "mfu", "MFU {:.1f} %", 100),
            _of(metrics, "memory_bandwidth", "memory bandwidth {:.0f} %", 100),
        ),
        "time": _join(time_line(metrics), f"{duration(metrics['eta_s'])} left" if metrics.get("eta_s") else ""),
    }
    return [f"{name:<6}  {text}" for name, text in lines.items() if text]


def time_line(metrics: Metrics) -> str:
    """Where the time of an iteration and of the checkpoint before it went, in percent, e.g. `12.3 s: decode 60 %`."""
    whole = metrics.get("iteration_s", 0.0) + metrics.get("checkpoint_s", 0.0)
    if whole <= 0:
        return ""
    shares = ((name, share) for name, share in time_shares(metrics).items() if share >= 0.005)
    return f"{whole:.1f} s: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares)


def time_shares(metrics: Metrics) -> dict[str, float]:
    """Shares of the time of an iteration with the checkpoint before it, by what it was used for; they add up to 1.

    Rollouts that were prefetched took their time beside the update before: only waiting for them counts here.
    """
    seconds = {name: metrics[key] for key, name in TIME_PARTS.items() if metrics.get(key, 0) > 0}
    if metrics.get("staleness"):
        seconds = {name: s for name, s in seconds.items() if name not in ("prefill", "decode", "waiting for search")}
        seconds["waiting for rollouts"] = metrics.get("rollout_wait_s", 0.0)
    whole = metrics.get("iteration_s", 0.0) + metrics.get("checkpoint_s", 0.0)
    if whole <= 0:
        return {}
    seconds["other"] = max(0.0, whole - sum(seconds.values()))
    total = sum(seconds.values())
    return {name: s / total for name, s in seconds.items()}


def duration(seconds: float) -> str:
    """In the unit that suits: `40 s`, `18 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _of(metrics: Metrics, name: str, form: str, scale: float = 1.0) -> str:
    return form.format(scale * metrics[name]) if name in metrics else ""


def _join(*texts: str) -> str:
    return " · ".join(filter(None, texts))
