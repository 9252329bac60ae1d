"""Settings in words: what is wrong with one, what each means and may be."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedms.fl.settings import Section

_TYPES = {"int_type": "int", "float_type": "float", "bool_type": "bool", "string_type": "str"}
_OUT_OF_RANGE = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number",
}  # fmt: skip


def in_words(error: ErrorDetails, tree: type[Section]) -> str:
    """What pydantic found in a tree of sections, as one sentence that names the setting."""
    known = _settings(tree)
    key = ".".join(part for part in error["loc"] if isinstance(part, str))
    entry = key + "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
    kind, got = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"unknown setting {key}{_nearest(key, known, tree)}"
    if kind == "model_type":
        return f"{key} is a section with settings of its own, got {got!r}"
    if kind == "tuple_type":
        return f"{key} must be a list, got {got!r}"
    if kind == "literal_error":
        choices = error.get("ctx", {})["expected"].replace(" or ", ", ").replace("'", "")
        return f"{entry} must be one of {choices}; got {got!r}"
    if kind in _TYPES:
        return f"{entry} must be of type {_TYPES[kind]}, got {got!r} ({type(got).__name__})"
    if kind in _OUT_OF_RANGE:
        return f"{entry} must be {_limits(known[key])}, got {got}"
    if kind == "value_error":  # a validator's: of one setting, or of a section that it speaks about
        separator = " " if key in known else "." if key else ""
        return f"{entry}{separator}{error.get('ctx', {})['error']}"
    return f"{entry}: {error['msg']}, got {got!r}"


def _nearest(key: str, known: Iterable[str], tree: type[Section]) -> str:
    """A hint at the setting that was probably meant: by the whole name, else by its last part."""
    keys = list(known)
    whole = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    found = same_leaf[:1] or whole or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return (
        f"; did you mean {found[0]}?"
        if found
        else f"; the sections are {', '.join(tree.model_fields)}"
    )


def _limits(setting: FieldInfo) -> str:
    """The range of a number, as a sentence goes on after "must be"."""
    low = next((limit for limit in setting.metadata if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in setting.metadata if isinstance(limit, Le | Lt)), None)
    if low is None:
        return "a finite number"
    least = low.ge if isinstance(low, Ge) else low.gt
    if high is not None:
        most = f"{high.le:g}]" if isinstance(high, Le) else f"{high.lt:g})"
        return f"in {'[' if isinstance(low, Ge) else '('}{least:g}, {most}"
    return f"at least {least}" if isinstance(low, Ge) else f"a finite number above {least:g}"


# Every setting ------------------------------------------------------------------------------------


def _settings(tree: type[Section]) -> dict[str, FieldInfo]:
    """All settings of a tree by dotted name."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, setting in section.model_fields.items():
            inner = setting.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from walk(inner, f"{prefix}{name}.")
            else:
                yield prefix + name, setting

    return dict(walk(tree, ""))


def explained(section: Section, path: str = "") -> Iterator[str]:
    """The lines of a section: settings, then the sections within, as TOML wants them."""
    sections = {name: value for name, value in section if isinstance(value, Section)}
    for name, value in section:
        if name not in sections:
            setting = type(section).model_fields[name]
            meaning = (setting.description or "").replace("``", "")
            yield from textwrap.wrap(
                " ".join(f"{meaning} {_form(setting)}".split()),
                width=100, initial_indent="# ", subsequent_indent="# ",
            )  # fmt: skip
            yield f"# {name} = (none)" if value is None else f"{name} = {_literal(value)}"
    for name, inner in sections.items():
        yield f"\n[{path}{name}]"
        yield from explained(inner, f"{path}{name}.")


def _form(setting: FieldInfo) -> str:
    """What a value may be, where the default does not show it."""
    if get_origin(setting.annotation) is Literal:
        return f"({' | '.join(get_args(setting.annotation))})"
    limited = any(isinstance(limit, Ge | Gt) for limit in setting.metadata)
    return f"({_limits(setting)})" if limited else ""


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_literal(key)} = {_literal(entry)}" for key, entry in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
