"""What every configuration section is built from: strict frozen models, keys with unit and bounds, one-line errors."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from r3rag_jax.errors import UserError

BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than_equal")  # pydantic's names


class ConfigError(UserError):
    """A configuration that cannot be used: one line with the dotted key, the rule and what came.

    `keys` are the dotted keys that the rule is about, so that the loader can name the lines they stand on.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class Section(BaseModel):
    """A frozen, hashable group of keys; values of another type and unknown keys are errors.

    Raises:
        ConfigError: at construction, for a value of another type or out of bounds, or a broken relation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dotted: ClassVar[str] = ""  # where the section stands in a Config, e.g. `rl.kl`; used by errors

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _first_error(error, type(self)) from None

    # Pydantic validates a nested section without calling __init__, so that an error has the full path of its key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        """A file or directory is on a local disk, or mounted: a URL would name a folder `gs:` here."""
        for name, field in type(self).model_fields.items():
            value, dotted = getattr(self, name), f"{self.dotted}.{name}".lstrip(".")
            is_path = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("unit") == "path"
            require(
                not (is_path and isinstance(value, str) and "://" in value),
                f"{dotted} must be a path on a disk of this machine; got {value}: copy it here first",
                dotted,
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, validated like a new section; defaults that depend on changed keys follow them."""
        return type(self)(**({name: getattr(self, name) for name in self.model_fields_set} | changes))


def key(
    default: Any,
    help: str,
    unit: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """A key with its default, the bounds of its value (`ge` >=, `gt` >, `le` <=), and its line in `--help`."""
    return Field(default, description=help, ge=ge, gt=gt, le=le, json_schema_extra={"unit": unit})


def section(default: Section, help: str = "") -> Any:
    """A nested section; `help` is its title in `--help`, where the docstring of its class is too general."""
    return Field(default, description=help, strict=False)  # strict would refuse the loader's nested dict


def require(ok: bool, message: str, *keys: str) -> None:
    """Raises ConfigError with `message`, about the dotted `keys`, unless `ok`."""
    if not ok:
        raise ConfigError(message, keys)


def check_names(values: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a list of names, of which each must be among `allowed` and none may come twice; for field validators."""
    listed = ", ".join(allowed)
    if not values:
        raise ValueError(f"must name at least one of {listed}; got none")
    for value in values:
        if value not in allowed:
            raise ValueError(f"must be among {listed}; got {value!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"must name nothing twice; got {', '.join(values)}")
    return values


# ---------------------------------------------------------------- words of errors and help


def bounds_of(field: FieldInfo) -> dict[str, Any]:
    """The bounds of a key by pydantic's names: `ge`, `gt`, `le`."""
    found = ((name, getattr(bound, name, None)) for bound in field.metadata for name in ("ge", "gt", "le"))
    return {name: value for name, value in found if value is not None}


def bound_words(bounds: dict[str, Any]) -> str:
    """Bounds as an error states them: `at least 0`, `above 0`, `in [0, 1]`."""
    if "le" in bounds:
        return f"in {'(' if 'gt' in bounds else '['}{bounds.get('gt', bounds.get('ge'))}, {bounds['le']}]"
    return f"above {bounds['gt']}" if "gt" in bounds else f"at least {bounds['ge']}"


def type_words(kind: Any) -> str:
    """A type as an error states it."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if typing.get_origin(kind) is tuple:
        noun = {str: "names", float: "numbers", int: "integers"}[typing.get_args(kind)[0]]
        return f"a list of {noun}"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}.get(kind, "a section")


def _first_error(error: ValidationError, cls: type[Section]) -> ConfigError:
    """The first of pydantic's errors as one line with the dotted key, the rule and what came."""
    found = error.errors(include_url=False)[0]
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    names = [str(part) for part in found["loc"] if isinstance(part, str)]
    dotted = ".".join([cls.dotted, *names] if cls.dotted else names)
    if found["type"] == "extra_forbidden":
        return ConfigError(f"unknown key {dotted!r}", [dotted])
    if cause is not None:
        return ConfigError(f"{dotted} {cause}", [dotted])
    field = _field(cls, names)
    if found["type"] in BOUND_ERRORS:
        return ConfigError(f"{dotted} must be {bound_words(bounds_of(field))}; got {found['input']}", [dotted])
    kind, index = field.annotation, [part for part in found["loc"] if isinstance(part, int)]
    if index:
        kind = typing.get_args(kind)[0]
    subject = dotted + "".join(f"[{i}]" for i in index)
    return ConfigError(f"{subject} must be {type_words(kind)}; got {found['input']!r}", [dotted])


def _field(cls: type[Section], names: Sequence[str]) -> FieldInfo:
    """The field at a path of nested sections."""
    field = cls.model_fields[names[0]]
    for name in names[1:]:
        field = typing.cast(type[Section], field.annotation).model_fields[name]
    return field
