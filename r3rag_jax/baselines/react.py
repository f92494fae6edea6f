"""ReAct (Yao et al., arXiv 2210.03629): thoughts and actions in turn, after each of which an observation is written.

    Thought 1: …
    Action 1: Search[query] | Lookup[word] | Finish[answer]
    Observation 1: …

`Search` observes the passages that the retriever finds, where the paper's reads the first paragraph of a Wikipedia
page. `Lookup` observes the next sentence of these passages that holds a word, and `Finish` answers. As in the released
code, a thought without an action is followed by "Action k:", any other action is observed as invalid, and after seven
actions the attempt ends without an answer; a thought and its action have 100 tokens. A prompt that is too long leaves
its oldest observations empty. The instruction and the examples are our own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from r3rag_jax.baselines.attempt import Attempt
from r3rag_jax.baselines.chain import first_line
from r3rag_jax.baselines.demonstrations import EIFFEL, RIVERS
from r3rag_jax.baselines.prompting import Example, PromptStyle, PromptWriter, text_stops
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done, Search, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context, Passage

ACTION = re.compile(r"(search|lookup|finish)\[([^\]]*)\]", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
NOTHING_FOUND, NOTHING_LEFT = "Nothing was found.", "No more results."


@dataclasses.dataclass(frozen=True)
class Turn:
    """A thought, an action and what was observed."""

    thought: str
    action: str
    observation: str

    def render(self, number: int, *, shows_observation: bool = True) -> str:
        """What follows `Thought {number}:`, up to the next one."""
        observation = self.observation if shows_observation else ""
        return (
            f" {self.thought}\nAction {number}: {self.action}\nObservation {number}: {observation}\n"
            f"Thought {number + 1}:"
        )


def as_observation(contents: str) -> str:
    """A passage in one line, after its title."""
    title, _, text = contents.partition("\n")
    return f"{title.strip().strip(chr(34))}: {' '.join(text.split())}" if text else title


def _example(question: str, turns: Sequence[Turn], thought: str, answer: str) -> Example:
    reply = "".join(turn.render(number) for number, turn in enumerate(turns, 1))
    return Example((), question, f"{reply} {thought}\nAction {len(turns) + 1}: Finish[{answer}]".strip())


STYLE = PromptStyle(
    "Answer the question by turns of Thought, Action and Observation. A thought says what is known and what is "
    "missing. An action is one of three: Search[query] finds passages, Lookup[word] shows the next sentence of these "
    "passages with the word, and Finish[answer] gives the answer, a name, a number or a few words only.",
    "Thought 1:",
    (
        _example(
            EIFFEL.question,
            (
                Turn(
                    "I need to find whose company built the Eiffel Tower.",
                    "Search[Eiffel Tower]",
                    as_observation(EIFFEL.hops[0].document),
                ),
                Turn(
                    "It was the company of Gustave Eiffel. I need to find where Gustave Eiffel was born.",
                    "Search[Gustave Eiffel]",
                    as_observation(EIFFEL.hops[1].document),
                ),
                Turn(
                    "I look for the place in this passage.",
                    "Lookup[born]",
                    "(Result 1 / 1) French engineer, born in Dijon in 1832.",
                ),
            ),
            "Gustave Eiffel was born in Dijon.",
            EIFFEL.answer,
        ),
        _example(
            RIVERS.question,
            tuple(
                Turn(f"I need to find the length of the {name}.", f"Search[{name}]", as_observation(hop.document))
                for name, hop in zip(("Nile", "Thames"), RIVERS.hops, strict=True)
            ),
            "6,650 km is longer than 346 km.",
            RIVERS.answer,
        ),
    ),
    says_cue=True,
)


def react_stops(tokenizer: Tokenizer) -> StopRule:
    """Return what ends a completion: an action has been taken, or another question begins."""
    return text_stops(tokenizer, "\nObservation", "\nQuestion:")


class ReActEnv:
    """One question, answered by an action."""

    def __init__(
        self,
        request: RolloutRequest,
        writer: PromptWriter,
        *,
        top_k: int,
        max_steps: int,
        max_tokens: int,
    ):
        """Create the Env of a request.

        Args:
            writer: of STYLE.
            top_k: passages per search.
            max_steps: maximum number of actions.
            max_tokens: budget of a thought and its action.
        """
        self._writer, self._top_k, self._max_steps, self._max_tokens = writer, top_k, max_steps, max_tokens
        self._attempt = Attempt(request, writer.tokenizer)
        self._turns: list[Turn] = []
        self._thought: str | None = None  # one that waits for its action
        self._passages: Sequence[Passage] = ()  # of the last search
        self._looked_up = ("", 0)  # the word of the last lookup, and how many of its sentences have been shown
        self._notes = ""  # turns since the last search, for the analysis of the next step

    def start(self) -> Context | Done:
        """See `Env.start`."""
        return self._context()

    def step(self, completion: Completion) -> Context | Search | Done:
        """See `Env.step`."""
        text = self._attempt.read(completion).partition("\nObservation")[0].partition("\nQuestion:")[0]
        number = len(self._turns) + 1
        if self._thought is None:
            thought, mark, action = text.partition(f"Action {number}:")
            if not mark:
                self._thought = first_line(thought)
                return self._context()
            thought = thought.strip()
        else:
            thought, action, self._thought = self._thought, text, None
        return self._act(thought, first_line(action))

    def _act(self, thought: str, action: str) -> Context | Search | Done:
        found = ACTION.match(action)
        name, words = (found[1].lower(), found[2].strip()) if found else ("", "")
        if name == "finish":
            return self._attempt.done(f"{self._notes}{thought}", words)
        self._turns.append(Turn(thought, action, ""))
        if name == "search" and words:
            self._looked_up = ("", 0)
            analysis, self._notes = f"{self._notes}{thought}", ""
            return self._attempt.search(words, self._top_k, analysis)
        observation = self._look_up(words) if name == "lookup" and words else f"Invalid action: {action}"
        self._notes += f"{thought}\n{action}\n{observation}\n"
        return self._observed(observation)

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        self._passages = [hit.passage for hit in hits[: self._top_k]]
        self._attempt.observe(self._passages)
        return self._observed(" ".join(as_observation(p.contents) for p in self._passages) or NOTHING_FOUND)

    def _observed(self, observation: str) -> Context | Done:
        self._turns[-1] = dataclasses.replace(self._turns[-1], observation=observation)
        return self._attempt.done(self._notes) if len(self._turns) >= self._max_steps else self._context()

    def _look_up(self, word: str) -> str:
        """The next sentence of the passages that holds a word."""
        last, num_shown = self._looked_up
        num_shown = num_shown if word == last else 0
        sentences = [part for p in self._passages for part in SENTENCE_END.split(p.text)]
        found = [sentence.strip() for sentence in sentences if word.lower() in sentence.lower()]
        self._looked_up = (word, num_shown + 1)
        if num_shown >= len(found):
            return NOTHING_LEFT
        return f"(Result {num_shown + 1} / {len(found)}) {found[num_shown]}"

    def _context(self) -> Context | Done:
        end = "" if self._thought is None else f" {self._thought}\nAction {len(self._turns) + 1}:"
        replies = [self._reply(num_hidden) + end for num_hidden in range(len(self._turns) + 1)]
        ids = self._writer.ids(self._attempt.question, self._max_tokens, *(((), reply) for reply in replies))
        return self._attempt.context(ids, self._max_tokens)

    def _reply(self, num_hidden: int) -> str:
        """What has been written, without the first so many observations."""
        turns = enumerate(self._turns, 1)
        return "".join(turn.render(number, shows_observation=number > num_hidden) for number, turn in turns)
