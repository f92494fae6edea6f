"""`launch/constraints.txt` pins what `setup.py` asks for, to versions that it admits."""

import ast

import pytest
from desk import LAUNCH
from packaging.requirements import Requirement

SETUP = ast.parse((LAUNCH.parent / "setup.py").read_text())
PINS = [
    Requirement(line)
    for line in (LAUNCH / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def core() -> list[Requirement]:
    """The requirements in the list CORE of `setup.py`."""
    (value,) = [
        node.value
        for node in SETUP.body
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["CORE"]
    ]
    return [Requirement(text) for text in ast.literal_eval(value)]


def pins_of(name: str, python: str) -> list[Requirement]:
    wanted = name.lower().replace("_", "-")
    found = [pin for pin in PINS if pin.name.lower().replace("_", "-") == wanted]
    return [pin for pin in found if pin.marker is None or pin.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_requirement_has_one_pin_that_it_admits(python: str) -> None:
    for requirement in core():
        (pin,) = pins_of(requirement.name, python)
        (version,) = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{requirement} does not admit {pin}"


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("name", ["libtpu", "gcsfs", "jaxlib"])
def test_what_the_extras_of_pods_bring_is_pinned(name: str, python: str) -> None:
    assert len(pins_of(name, python)) == 1


def test_each_pin_is_one_version() -> None:
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in PINS)
