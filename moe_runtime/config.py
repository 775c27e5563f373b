"""Reads a tree of frozen dataclasses from YAML, and names what is wrong where.

The type hints of the dataclass are the schema: `int`, `float`, `str`, `bool`, `date`, `Literal`,
`X | None`, tuples, `dict[str, Any]`, other dataclasses, and
`Annotated[X, Plausible(low, high, unit)]`.
"""

import dataclasses
import difflib
import math
import os
import types
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from moe_runtime.errors import ConfigError

T = TypeVar("T")

_SCALARS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    date: "a date such as 2026-01-31",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Plausible:
    """The range outside which a number is a mistake rather than a surprise; ends belong to it."""

    low: float
    high: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.low:.12g} to {self.high:.12g} {self.unit}".rstrip()


def load_config(kind: type[T], path: Path, *, remedy: str) -> T:
    """The `kind` that the YAML file holds. Raises ConfigError, which ends with `remedy`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; {remedy}") from None
    try:
        found = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} is not sound YAML: {reason}; {remedy}") from error
    return parse_config(kind, found, source=str(path), remedy=remedy)


def parse_config(kind: type[T], found: object, *, source: str, remedy: str) -> T:
    """`kind` from plain mappings, lists and scalars. `source` is named in errors."""
    try:
        parsed = _parse(kind, found, "")
    except _MistakeError as mistake:
        raise ConfigError(f"{source}: {mistake}; {remedy}") from mistake
    assert isinstance(parsed, kind)
    return parsed


def plain_config(config: object) -> dict[str, Any]:
    """Mappings, lists and scalars that `parse_config` turns back; what is None is left out."""
    assert dataclasses.is_dataclass(config)
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None
    }


def save_config(config: object, path: Path, *, heading: str) -> None:
    """Write `config` as YAML under a comment, all of it or nothing.

    A list of small mappings takes a line each, as a table does.
    """
    body = yaml.dump(_as_rows(plain_config(config)), Dumper=_Dumper, sort_keys=False, width=10_000)
    text = f"# {heading}\n{body}"
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; name another file"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then take its place: nobody ever reads half of it."""
    if path.exists() and not path.is_file():  # /dev/stdout must not be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class _MistakeError(ValueError):
    """What is wrong, with the place in the tree, before the file and the remedy are added."""


def _parse(hint: Any, value: object, where: str) -> Any:
    """`value` as the type that `hint` names."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        parsed = _parse(arguments[0], value, where)
        for constraint in arguments[1:]:
            _check_plausible(parsed, constraint, where)
        return parsed
    if origin in (types.UnionType, Union):
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        assert len(kinds) == 1, f"only X | None is understood, not {hint}"
        return None if value is None else _parse(kinds[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise _MistakeError(
                f"{where} ({value!r}) must be one of {', '.join(map(str, arguments))}"
            )
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is dict:  # its names belong to somebody else, who checks them
        if not isinstance(value, dict):
            raise _MistakeError(f"{where} must hold `name: value` lines, not {_described(value)}")
        return value
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _parse_mapping(hint, value, where)
    return _parse_scalar(hint, value, where)


def _parse_scalar(kind: type, value: object, where: str) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # neither True as 1 nor a time of day as a date
        raise _MistakeError(f"{where} ({value!r}) must be {_SCALARS[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _MistakeError(f"{where} ({value}) must be a finite number")
    return value


def _parse_tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _MistakeError(f"{where} ({value!r}) must be a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise _MistakeError(f"{where} has {len(value)} entries and must have {len(kinds)}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_parse(kind, entry, f"{where}[{index}]") for index, (kind, entry) in pairs)


def _parse_mapping(kind: type, value: object, where: str) -> object:
    at = where or "the file"
    if not isinstance(value, dict):
        raise _MistakeError(f"{at} must hold `name: value` lines, not {_described(value)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise _MistakeError(
                f"unknown key {_join(where, key)}, {_suggestion(key, list(fields))}"
            )
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING
        if name not in value and not has_default:
            raise _MistakeError(f"{_join(where, name)} is missing")
    hints = get_type_hints(kind, include_extras=True)
    parsed = {key: _parse(hints[key], entry, _join(where, key)) for key, entry in value.items()}
    try:
        return kind(**parsed)
    except ValueError as error:  # what the dataclass itself checks, across its fields
        raise _MistakeError(_join(where, error)) from error


def _check_plausible(value: object, constraint: object, where: str) -> None:
    assert isinstance(constraint, Plausible)
    assert isinstance(value, int | float)
    if not constraint.low <= value <= constraint.high:
        raise _MistakeError(f"{where} ({value}) is outside {constraint}")


def _suggestion(key: object, names: list[str]) -> str:
    near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    return f"the nearest is {near[0]}" if near else f"the keys here are {', '.join(names)}"


def _join(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _described(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return plain_config(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value


class _Row(dict[str, Any]):
    """A mapping that takes one line of YAML."""


class _Flat(list[Any]):
    """A list that takes one line of YAML."""


def _as_rows(value: Any) -> Any:
    """The same tree; mappings in lists, and lists of scalars, marked to take a line each."""
    if isinstance(value, dict):
        return {key: _as_rows(entry) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    entries = [_as_rows(entry) for entry in value]
    if not any(isinstance(entry, dict | list) for entry in entries):
        return _Flat(entries)
    return [_Row(entry) if _is_small(entry) else entry for entry in entries]


def _is_small(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(value, _Flat) or not isinstance(value, dict | list) for value in entry.values()
    )


class _Dumper(yaml.SafeDumper):
    """Block style, but for rows and flat lists."""


_Dumper.add_representer(
    _Row,
    lambda dumper, row: dumper.represent_mapping(
        "tag:yaml.org,2002:map", row.items(), flow_style=True
    ),
)
_Dumper.add_representer(
    _Flat,
    lambda dumper, entries: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", entries, flow_style=True
    ),
)


class _StrictLoader(yaml.SafeLoader):
    """Of two values for one key PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
