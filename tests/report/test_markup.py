"""Laws of markup: text stays text, whatever is in it."""

from html import unescape

from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.report.markup import Markup, tag, text


@given(st.text())
def test_text_is_read_back_as_it_was_and_holds_no_markup(written: str) -> None:
    found = text(written)
    assert not set("<>\"'") & set(found)
    seen = unescape(found)
    assert len(seen) == len(written)
    for before, after in zip(written, seen, strict=True):
        assert after == before or after in "\ufffd?"


@given(st.text(), st.text())
def test_an_attribute_cannot_end_its_element(value: str, child: str) -> None:
    found = tag("p", child, title=value)
    assert found.count("<") == found.count(">") == 2
    assert found.count('"') == 2


def test_markup_is_not_escaped_twice() -> None:
    assert tag("p", tag("b", "a & b")) == "<p><b>a &amp; b</b></p>"
    assert text(Markup("<br>")) == "<br>"
    assert tag("i", class_="x", data_cells=1, hidden=None) == '<i class="x" data-cells="1"></i>'
