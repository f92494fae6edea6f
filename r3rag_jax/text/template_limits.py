"""A sandbox for chat templates whose work is limited: a template is a program, and may come with any checkpoint.

Jinja's sandbox keeps a template from attributes, code and files, but not from `{% set x = x ~ x %}` in a loop, nor from
`'x'.ljust(10 ** 10)`. Here all that can take time or memory is paid from a budget before it happens: each turn of a
loop and each call costs CALL, each text or list that is read, made or written its size. The budget is spent alike on
every machine; none is a matter of seconds by a clock.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_WORK = 4_000_000  # of a rendering; templates of published models need some thousands for a message
CALL = 20  # of a turn of a loop, or a call
MAX_BITS = 10_000  # of a whole number
WIDE = re.compile(r"\d{5}|\*")  # a width in a format: '%99999d'


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; `start` gives it a new budget."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any):
        super().__init__(finalize=self.paid, **options)
        self._left = MAX_WORK
        del self.globals["lipsum"]  # as much text as it is asked for
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, or replace one."""
        self.filters[name] = self._limited(name, function)

    def start(self) -> None:
        """Begin a rendering."""
        self._left = MAX_WORK

    def charge(self, work: int) -> str:
        """Take work from the budget; returns "" where a template calls it.

        Raises:
            TemplateError: there is not as much left.
        """
        self._left -= work
        if self._left < 0:
            raise jinja2.TemplateError(f"a chat template may do work of {MAX_WORK} characters and steps; it does more")
        return ""

    def joined(self, *values: Any) -> str:
        """The operator ~."""
        return "".join(str(self.paid(value)) for value in values)

    def paid(self, value: Any) -> Any:
        """A value that is iterated over, compared or cut."""
        self.charge(self._size(value))
        return value

    # ---- what Jinja calls

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as Jinja names them
        """Every call in a template; see `SandboxedEnvironment.call`."""
        if getattr(__obj, "__self__", None) is not self:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str) and getattr(__obj, "__name__", "").startswith("format") and WIDE.search(owner):
                self.charge(MAX_WORK + 1)
            self._pay(owner if isinstance(owner, str) else "", *args, *kwargs.values())
        return self.paid(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators *, **, + and %."""
        work = self._size(left) + self._size(right)
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}
            work += MAX_WORK if bits.get(operator, 0) > MAX_BITS else 0
        elif operator == "*":
            work *= max(1, *(number for number in (left, right) if isinstance(number, int)), 1)
        elif operator == "%" and isinstance(left, str) and WIDE.search(left):
            work += MAX_WORK
        self.charge(work)
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Charging().visit(super()._parse(source, name, filename))

    # ---- what is paid

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are paid for."""

        @functools.wraps(function)  # also what Jinja marks functions with
        def limited(*args: Any, **kwargs: Any) -> Any:
            values = args[1:] if hasattr(function, "jinja_pass_arg") else args
            if name == "format" and WIDE.search(str(values[0])):
                self.charge(MAX_WORK + 1)
            self._pay(*values, *kwargs.values())
            return self.paid(function(*args, **kwargs))

        return limited

    def _pay(self, subject: Any = "", *others: Any) -> None:
        """Pay for a function of a subject and arguments, of which the result may be as large as their product."""
        reach = math.prod(1 + (abs(v) if isinstance(v, int) else len(v) if isinstance(v, str) else 0) for v in others)
        size = sum(map(self._size, (subject, *others)))
        self.charge(CALL + size + (MAX_WORK + 1 if (1 + self._size(subject)) * reach > MAX_WORK else 0))

    def _size(self, value: Any) -> int:
        """Characters and members of a value; at most a little more than what is left."""
        size, waiting = 0, [value]
        while waiting and size <= max(self._left, 0):
            one = waiting.pop()
            if isinstance(one, str | bytes):
                size += len(one)
            elif isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set):
                waiting += one
            elif isinstance(one, range):
                size += len(one)
            elif isinstance(one, int):
                size += one.bit_length() // 4
            size += 1
        return size


class _Charging(NodeTransformer):
    """Lets loops, macros, comparisons, slices and ~ pay."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A loop costs what it goes over, each turn of it what its body writes of its own."""
        node.iter = _call("paid", [node.iter])
        return self._paying(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Both sides of == and `in` are read."""
        self.generic_visit(node)
        node.expr = _call("paid", [node.expr])
        for operand in node.ops:
            operand.expr = _call("paid", [operand.expr])
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice is a copy."""
        self.generic_visit(node)
        return _call("paid", [node]) if isinstance(node.arg, nodes.Slice) else node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        """So does each call of a macro."""
        return self._paying(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        """And of a call block."""
        return self._paying(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` becomes a call of `LimitedEnvironment.joined`."""
        self.generic_visit(node)
        return _call("joined", node.nodes)

    def _paying(self, node: Any) -> nodes.Node:
        work = CALL + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("charge", [nodes.Const(work)])))
        return node


def _call(name: str, args: list[Any]) -> nodes.Call:
    """A call of a method of the environment, which no template can name."""
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
