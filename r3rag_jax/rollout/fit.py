"""The questions whose first prompt fits the context, found before anything is rolled out."""

from __future__ import annotations

from collections.abc import Mapping

from r3rag_jax.data.records import OnError, Records
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.types import Question

EnvFactories = Mapping[str, EnvFactory]  # by the name of the system


def fitting_questions(
    questions: Records[Question], env_factories: EnvFactories, max_length: int, on_error: OnError
) -> Records[Question]:
    """The questions that fit in every one of some systems, so that all of them are asked the same.

    Args:
        max_length: `rollout.max_length`, which the first prompt and its completion must fit.

    Raises:
        UserError: a question does not fit, and `on_error` does not leave it out; or none fits.
    """
    return on_error.check(questions, lambda question: misfit(question, env_factories, max_length))


def misfit(question: Question, env_factories: EnvFactories, max_length: int) -> str | None:
    """Why a question does not fit one of some systems, for a message; None if it fits all of them."""
    needed = {name: factory.num_tokens(question) for name, factory in env_factories.items() if factory.num_tokens}
    name = max(needed, key=lambda name: needed[name], default="")
    if not name or needed[name] <= max_length:
        return None
    return (
        f"prompt and completion of {name} must fit rollout.max_length={max_length}; got {needed[name]} tokens "
        f"with question {question.id!r}"
    )
