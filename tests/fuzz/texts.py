"""Texts: protocols, token ids of steps and passages, chat templates, verdicts of a judge, JSON."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import tiny

from r3rag_jax.json_text import MAX_DEPTH, parse_json
from r3rag_jax.rewards.judge.prompts import Prompts
from r3rag_jax.rewards.judge.verdicts import read_candidates, read_verdict
from r3rag_jax.text.chat_template import ChatTemplate
from r3rag_jax.text.protocols import TAGS, make_protocol
from r3rag_jax.text.transcript import Codec, Transcript
from r3rag_jax.types import Passage, Question, Step
from tests.fuzz import mutate
from tests.fuzz.target import READ, REFUSED, Run, ensure

PROTOCOLS = ("tags", "steps", "search_r1")
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}{% if loop.last %}x{% endif %}{% endfor %}{{ bos_token }}",
    "{% macro f(x) %}{{ x.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
)
EXPRESSIONS = (
    "messages", "m.content", "''.__class__.__mro__", "range(10**9)", "range(99999)", "'a' * 10**9", "[1] * 10**8",
    "'%1000000000d' % 1", "'{:1000000000}'.format(1)", "'a'.ljust(10**10)", "m|tojson", "x|indent(10**9)",
    "raise_exception('no')", "strftime_now('%Y')", "cycler('a').__init__.__globals__", "2 ** 2 ** 99", "lipsum(10**6)",
    "messages|map(attribute='content')|join", "self", "namespace()", "bos_token ~ eos_token", "f(f)", "loop.index",
)  # fmt: skip


def open_protocols(directory: Path) -> Run:
    """`parse_step` of any text; what is well formed is rendered and read back as it is."""
    protocols = [make_protocol(name) for name in PROTOCOLS]

    def run(rng: random.Random) -> str:
        protocol, number, text = rng.choice(protocols), rng.randrange(1, 4), _step_text(rng)
        step = protocol.parse_step(text, number)
        if not step.is_well_formed:
            return REFUSED
        ensure(protocol.name != "tags" or not any(tag in field for tag in TAGS for field in _fields(step)), step)
        ensure(all(field.strip() for field in _fields(step)[-1:]), step)
        if protocol.name == "tags":
            ensure(protocol.parse_step(protocol.render_step(step, number), number) == step, text)
        return READ

    return run


def _step_text(rng: random.Random) -> str:
    """Any text, or one that begins as a step does."""
    if rng.random() < 0.3:
        return mutate.text(rng, 20)
    step = _step(rng)
    protocol = make_protocol(rng.choice(PROTOCOLS))
    text = protocol.render_step(step, rng.randrange(1, 4))
    start = rng.randrange(len(text) + 1)
    return text if rng.random() < 0.5 else text[:start] + mutate.text(rng, 3) + text[start + rng.randrange(3) :]


def _step(rng: random.Random) -> Step:
    analysis, value = mutate.text(rng), mutate.text(rng, 6)
    return Step(analysis, query=value) if rng.random() < 0.5 else Step(analysis, answer=value)


def _fields(step: Step) -> list[str]:
    return [field for field in (step.analysis, step.query, step.answer) if field is not None]


def open_transcripts(directory: Path) -> Run:
    """Questions, steps and passages as ids: no text becomes a special token, and what is readable is read back."""
    tokenizer = tiny.tokenizer(directory / "tokenizer")
    codecs = [Codec(tokenizer, make_protocol(name), 16) for name in PROTOCOLS]
    special = tokenizer.special_ids

    def specials(ids: list[int]) -> list[int]:
        return [id for id in ids if id in special]

    plain = {codec.protocol.name: specials(Transcript(codec, "?").context) for codec in codecs}

    def run(rng: random.Random) -> str:
        codec = rng.choice(codecs)
        transcript = Transcript(codec, mutate.text(rng))
        ensure(specials(transcript.context) == plain[codec.protocol.name], "a question holds special tokens")
        passages = tuple(Passage(str(i), mutate.text(rng) or "x") for i in range(rng.randrange(3)))
        step = _step(rng)
        ids = codec.step_ids(step, 1)
        ensure(len(specials(ids)) == (4 if codec.protocol.name == "tags" else 1 - codec.protocol.is_one_sequence), step)
        transcript.write(ids)
        before = len(specials(transcript.context))
        transcript.add_passages(passages)
        added = len(specials(transcript.context)) - before
        ensure(added == 2 * (codec.protocol.name == "tags"), "a passage holds special tokens")
        read = codec.parse_step(ids, 1)
        trajectory = tiny_trajectory(step)
        if codec.unreadable_step(trajectory) is not None:
            return REFUSED
        same = [codec.tokenizer.decode(codec.tokenizer.encode(f, allow_special=False)).strip() for f in _fields(step)]
        ensure(_fields(read) == same and read.is_well_formed, (step, read))
        return READ

    return run


def tiny_trajectory(step: Step):  # type: ignore[no-untyped-def]
    """A trajectory of one step."""
    from r3rag_jax.types import Status, Trajectory

    return Trajectory(Question("q", "?", ("a",)), (step,), Status.ANSWERED)


def open_templates(directory: Path) -> Run:
    """Chat templates from elsewhere: rendered within their limits, or refused with a ValueError."""
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]

    def run(rng: random.Random) -> str:
        template = rng.choice(TEMPLATES)
        for _ in range(rng.randrange(3)):
            expression = rng.choice(EXPRESSIONS)
            piece = rng.choice((
                f"{{{{ {expression} }}}}", f"{{% for i in {expression} %}}{{{{ i }}}}{{% endfor %}}",
                f"{{% set x = {expression} %}}", "{% for i in range(9999) %}", "{% endfor %}", "{% set x = x ~ x %}",
                mutate.text(rng, 2),
            ))  # fmt: skip
            start = rng.randrange(len(template) + 1)
            template = template[:start] + piece + template[start:]
        try:
            ChatTemplate(template).render(messages, {"bos_token": "<s>"}, add_generation_prompt=True)
        except ValueError:
            return REFUSED
        return READ

    return run


def open_verdicts(directory: Path) -> Run:
    """Replies of a judge: a number in [0, 1] or none; what a passage says is no verdict of the template's."""
    prompts = Prompts()

    def run(rng: random.Random) -> str:
        reply = "\n".join(mutate.text(rng, 5) for _ in range(rng.randrange(6)))
        values = [read_verdict(reply, "relevance"), read_verdict(reply, "correctness")]
        ensure(all(value is None or 0 <= value <= 1 for value in values), reply)
        candidates = read_candidates(reply)
        ensure(candidates is None or all(candidates), reply)
        question = Question("q", mutate.text(rng), (mutate.text(rng, 3) or "x",))
        passage = Passage("p", mutate.text(rng))
        prompt = prompts.ask_relevance(question, Step("a", query="b", passages=(passage,))).prompt
        ensure(prompt.count("\nHow relevant are these documents") == 1, "a document ends its block")
        ensure(read_verdict(prompt, "relevance") is None or "<think>" in prompt, "a document gives a verdict")
        return READ if values != [None, None] else REFUSED

    return run


def open_json(directory: Path) -> Run:
    """JSON of any depth: read as json does, or a ValueError."""

    def run(rng: random.Random) -> str:
        text = mutate.json_text(mutate.changed(mutate.value(rng), rng), rng)
        if rng.random() < 0.05:
            text = rng.choice(("[", '{"a":', "[[", '[{"a":')) * rng.choice((10, MAX_DEPTH, 1000, 200_000)) + text
        data = mutate.maybe_damaged(text.encode("utf-8", "surrogatepass"), rng)
        try:
            found = parse_json(data)
        except ValueError:
            return REFUSED
        expected = json.loads(data)
        ensure(found == expected or _holds_nan(expected), text[:300])
        return READ

    return run


def _holds_nan(value: object) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_nan, children))
