"""The bodies of the demo's requests: their schemas, with the limits and defaults of the server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, create_model

from r3rag_jax.config import MAX_SEED
from r3rag_jax.config.serving import DemoConfig
from r3rag_jax.live.player import Player, Settings
from r3rag_jax.serving.bodies import whole

MAX_TEMPERATURE = 2.0
STRICT = ConfigDict(strict=True, extra="forbid")


class NextBody(BaseModel):
    """How a paused question goes on."""

    model_config = STRICT

    single_steps: bool = Field(True, description="pause after the next step again")


def ask_body(config: DemoConfig, player: Player) -> type[BaseModel]:
    """The model of the body of `POST /v1/ask`."""
    default = player.defaults
    policies: Any = Literal[tuple(player.policies)]
    retrievers: Any = Literal[tuple(player.retriever_titles)]

    def count(most: int, value: int) -> Any:
        return Annotated[int, Field(ge=1, le=max(most, value)), BeforeValidator(whole)], value

    return create_model(
        "Ask",
        __config__=STRICT,
        question=(Annotated[str, StringConstraints(max_length=config.max_question_chars)], ...),
        policy=(policies, default.policy),
        retriever=(retrievers, default.retriever),
        k=count(config.max_k, default.k),
        steps=count(config.max_steps, default.steps),
        temperature=(Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)], default.temperature),
        seed=(Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(whole)], default.seed),
        single_steps=(bool, Field(False, description="pause after each step, until POST /v1/questions/{id}/next")),
        stream=(bool, Field(True, description="false: one JSON object when the question is finished")),
    )


def settings_of(body: Any) -> Settings:
    """The settings in a body of `ask_body`."""
    return Settings(
        body.policy, body.retriever, body.k, body.steps, body.temperature, body.seed, body.single_steps and body.stream
    )
