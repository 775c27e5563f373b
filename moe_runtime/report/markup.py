"""HTML that is escaped by construction: what is not Markup is text."""

from collections.abc import Sequence
from html import escape

# Of these HTML knows no way to write them; a model's name may hold any.
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
_VOID = frozenset(("meta", "br", "col"))  # they have no end


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as a reader sees it, whatever is in it."""
    if isinstance(value, Markup):
        return value
    whole = str(value).encode("utf-8", "replace").decode("utf-8")  # no half of a character
    return Markup(escape(whole.translate(_CONTROLS), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. `class_` is class, and `_` in an attribute's name a hyphen; None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        assert not children, name
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{''.join(map(text, children))}</{name}>")


def joined(parts: Sequence[Markup]) -> Markup:
    """One after the other."""
    return Markup("".join(parts))


def table(rows: Sequence[tuple[object, ...]], *, head: tuple[object, ...] = ()) -> Markup:
    """The first cell of a row names it; the others are right-aligned where they are numbers."""
    names = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_="number" if _is_number(cell) else None) for cell in row[1:]),
        )
        for row in rows
    ]
    return tag("table", *([tag("thead", names)] if head else []), tag("tbody", *body))


def _is_number(cell: object) -> bool:
    return str(cell)[:1].isdigit()
