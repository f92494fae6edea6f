"""The trajectories that the page's explorer shows, as one block of JSON that a script on the page reads.

All of a run's recorded trajectories are in it, up to a size: whole groups are left out evenly first, then the tokens of
the oldest. A passage is in it once, however many steps show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from r3rag_jax.evaluation.groups import type_group
from r3rag_jax.reporting.rendering import outcome, pretty, title_of, visible
from r3rag_jax.reporting.run_files import Rollout, Run
from r3rag_jax.types import Passage, Trajectory

MAX_BYTES = 8_000_000  # of the block, about
PER_TOKEN = {"logprobs": "lp", "advantages": "av", "entropies": "en"}  # name in a recorded step -> in the block
ROLLOUTS = "rl"  # source of the trajectories that RL keeps


class Block(NamedTuple):
    """The data of the explorer."""

    json: Markup  # escaped: it may stand in a <script> element
    num: int
    num_left_out: int
    has_tokens: bool


def explorer_block(run: Run) -> Block:
    """The trajectories of a run, as many as fit `MAX_BYTES`."""
    passages = _Passages()
    titles = {evaluation["system"]: title_of(evaluation) for evaluation in run.evals}
    titles = {ROLLOUTS: "RL rollouts"} | {name: visible(titles.get(name, name)) for name in run.trajectories}
    sources = {ROLLOUTS: [_rollout(rollout, passages) for rollout in run.rollout_rows]}
    sources |= {name: [_item(trajectory, passages) for trajectory in of] for name, of in run.trajectories.items()}
    num = sum(map(len, sources.values()))
    sources = _fitting(sources, passages)
    shown = {
        "passages": passages.shown_in(sources.values()),
        "sources": [{"name": name, "title": titles[name], "items": items} for name, items in sources.items()],
    }
    kept = sum(map(len, sources.values()))
    has_tokens = any("t" in step for items in sources.values() for item in items for step in item["steps"])
    return Block(embedded(shown), kept, num - kept, has_tokens)


def embedded(value: Any) -> Markup:
    """JSON that may stand in a <script> element: no text in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}))


class _Passages:
    """Passages by number; equal ones have one."""

    def __init__(self) -> None:
        self._numbers: dict[Passage, int] = {}

    def number(self, passage: Passage) -> int:
        return self._numbers.setdefault(passage, len(self._numbers))

    def size(self, numbers: Iterable[int]) -> int:
        """Bytes of these passages."""
        passages = list(self._numbers)
        return sum(len(passages[number].contents.encode()) + len('["",""],') for number in numbers)

    def shown_in(self, sources: Iterable[Sequence[dict[str, Any]]]) -> list[list[str]]:
        """[title, text] of the passages of these items, which are renumbered in place."""
        passages, order = list(self._numbers), dict[int, int]()
        for items in sources:
            for item in items:
                for step in item["steps"]:
                    step["p"] = [order.setdefault(number, len(order)) for number in step["p"]]
                item["sup"] = [order[number] for number in item["sup"] if number in order]
        shown = (passages[number] for number in order)
        return [["" if p.title == p.text else visible(p.title), visible(p.text)] for p in shown]


def _rollout(rollout: Rollout, passages: _Passages) -> dict[str, Any]:
    item = _item(rollout.trajectory, passages) | {"i": rollout.iteration, "r": round(rollout.reward, 4)}
    for step, recorded in zip(item["steps"], rollout.row["steps"], strict=True):
        step |= _recorded(recorded)
    return item


def _item(trajectory: Trajectory, passages: _Passages) -> dict[str, Any]:
    question, result = trajectory.question, outcome(trajectory)
    supporting = set(question.supporting_ids)
    steps = []
    for step in trajectory.steps:
        shown: dict[str, Any] = {"a": visible(step.analysis), "p": [passages.number(p) for p in step.passages]}
        shown |= {"q": visible(step.query)} if step.query is not None else {}
        shown |= {"ans": visible(step.answer)} if step.answer is not None else {}
        steps.append(shown if step.is_well_formed else shown | {"bad": 1})
    found = {passages.number(p) for step in trajectory.steps for p in step.passages if p.id in supporting}
    return {
        "id": visible(question.id), "q": visible(question.question),
        "gold": [visible(answer) for answer in question.golden_answers],
        "type": visible(pretty(type_group(question) or "")), "status": pretty(trajectory.status.name.lower()),
        "kind": result.kind, "label": result.label, "s": trajectory.sample_index, "sup": sorted(found),
        "nsup": len(supporting), "steps": steps,
    }  # fmt: skip


def _recorded(step: Mapping[str, Any]) -> dict[str, Any]:
    """What RL has recorded of a step; runs of other versions lack some or all of it."""
    found: dict[str, Any] = {}
    for name, short in (("reward", "r"), ("advantage", "adv")):
        if isinstance(step.get(name), int | float):
            found[short] = round(step[name], 3)
    tokens = step.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        found["t"] = [visible(token) for token in tokens]
        for name, short in PER_TOKEN.items():
            values = step.get(name)
            if isinstance(values, list) and len(values) == len(tokens):
                found[short] = [round(float(value), 2) for value in values]
    return found


def _fitting(sources: dict[str, list[dict[str, Any]]], passages: _Passages) -> dict[str, list[dict[str, Any]]]:
    """What fits `MAX_BYTES`: every n-th group of each source, and the tokens of the newest of these."""
    bare = {name: [_without_tokens(item) for item in items] for name, items in sources.items()}
    sizes = {name: list(map(_size, items)) for name, items in bare.items()}
    groups = {name: _groups(items) for name, items in sources.items()}
    kept, left = dict[str, list[int]](), 0
    for stride in range(1, 1 + max(map(len, groups.values()), default=0)):
        kept = {name: [index for group in of[::stride] for index in group] for name, of in groups.items()}
        shown = {n for name, of in kept.items() for i in of for step in bare[name][i]["steps"] for n in step["p"]}
        left = MAX_BYTES - sum(sizes[name][i] for name, of in kept.items() for i in of) - passages.size(shown)
        if left >= 0:
            break
    for name, of in kept.items():
        for index in sorted(of, reverse=True):
            left -= _size(sources[name][index]) - sizes[name][index]
            if left >= 0:
                bare[name][index] = sources[name][index]
    return {name: [bare[name][index] for index in sorted(of)] for name, of in kept.items() if of}


def _groups(items: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Indices of the items that are compared: the samples of a question in an iteration."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, item in enumerate(items):
        found.setdefault((item.get("i"), item["id"]), []).append(index)
    return list(found.values())


def _size(value: Any) -> int:
    """Bytes in the block, where no text is escaped."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _without_tokens(item: dict[str, Any]) -> dict[str, Any]:
    names = ("t", *PER_TOKEN.values())
    steps = [{name: value for name, value in step.items() if name not in names} for step in item["steps"]]
    return item | {"steps": steps}
