"""Chat templates are programs of others: what takes time or memory ends at a limit, and nothing leaves the sandbox."""

from __future__ import annotations

import pytest

from r3rag_jax.text.chat_template import ChatTemplate

WORK = 150_000  # that templates may do here: less time than with the real limit

MESSAGES = [{"role": "user", "content": "Who?"}]
ENDLESS = {
    "loops in loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "a doubled text": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "one that is added": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a list of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "the width of a text": "{{ 'a'.ljust(10**10) }}",
    "the width of a format": "{{ '%99999999d' % 1 }}",
    "of str.format": "{{ '{:99999999}'.format(1) }}",
    "of the filter format": "{{ '%99999999s'|format('a') }}",
    "of the filter indent": "{{ 'b'|indent(10**9) }}",
    "a product": "{{ 'x' * 10**9 }}",
    "a list's": "{{ [1] * 10**9 }}",
    "a power": "{{ 2 ** (2 ** 40) }}",
    "a replacement": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "a long separator": "{{ range(99999)|join('x' * 99999) }}",
    "searches": "{% set l = range(9999)|list %}{% for i in l %}{% if -1 in l %}{% endif %}{% endfor %}",
    "sums": "{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
    "slices": "{% set l = range(9999)|list %}{% for i in l %}{% set x = l[1:] %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "much text": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
}


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3rag_jax.text.template_limits.MAX_WORK", WORK)


@pytest.mark.parametrize("name", ENDLESS)
def test_work_without_end_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"may do work of {WORK} characters and steps; it does more"):
        ChatTemplate(ENDLESS[name]).render(MESSAGES, {}, add_generation_prompt=True)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()", "messages.__init__.__globals__", "cycler.__init__.__globals__.os",
        "range.__class__", "self.__init__", "(1).__class__.__base__", "namespace.__init__.__globals__['os']",
        "messages.append(1)", "lipsum(99)", "open('/etc/passwd')", "__import__('os')", "environment.filters.clear()",
        "charge(-10**9)", "namespace().charge", "strftime_now.__globals__",
    ],
)  # fmt: skip
def test_nothing_leaves_the_sandbox(expression: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ " + expression + " }}")
    try:
        assert template.render(MESSAGES, {}, add_generation_prompt=True) == "Who?"  # an undefined name is no text
    except ValueError as error:
        assert any(word in str(error) for word in ("unsafe", "undefined", "immutable", "may do work"))


def test_each_rendering_has_the_whole_budget() -> None:
    template = ChatTemplate("{% for m in messages %}{% for i in range(6000) %}{% endfor %}{{ m.content }}{% endfor %}")
    assert [template.render(MESSAGES, {}, add_generation_prompt=True) for _ in range(5)] == ["Who?"] * 5
    with pytest.raises(ValueError, match="may do work"):
        template.render(MESSAGES * 2, {}, add_generation_prompt=True)


def test_what_templates_do_otherwise_is_as_in_jinja() -> None:
    text = (
        "{% macro f(x, y='-') %}{{ x ~ y }}{% endmacro %}{{ f('a') }}{{ f('b', y=1) }}{{ ['c', 'd']|join('+') }}"
        "{{ 'x' * 3 + 'y' }}{{ '%s=%d' % ('n', 7) }}{{ 2 ** 10 - 24 }}{{ 'abc'[1:] }}{{ 'b' in 'abc' }}"
        "{% for i in [3, 1, 2]|sort if i > 1 %}{{ loop.index }}{{ i }}{% else %}none{% endfor %}"
        "{% call(n) g() %}{{ n }}{% endcall %}{{ {'a': 1}|tojson }}{{ none ~ 1 }}"
    )
    macro = "{% macro g() %}{{ caller('z') }}{% endmacro %}"
    rendered = ChatTemplate(macro + text).render(MESSAGES, {}, add_generation_prompt=True)
    assert rendered == 'a-b1c+dxxxyn=71000bcTrue1223z{"a": 1}None1'
