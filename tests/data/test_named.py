"""NAME=DATA, as --ood takes it."""

from __future__ import annotations

import pytest

from ssod_edge.data.named import NamedData, Via, parse_named_data, parse_via
from ssod_edge.errors import UsageError


def test_names_and_their_data() -> None:
    assert parse_named_data(("a=x", "b=torch/y:z=1")) == {"a": "x", "b": "torch/y:z=1"}


@pytest.mark.parametrize("item", ["grey", "=x", "a="])
def test_another_form_is_refused(item: str) -> None:
    with pytest.raises(UsageError, match=f"expected --ood NAME=DATA, got '{item}'"):
        parse_named_data((item,))


@pytest.mark.parametrize("items", [("a=x", "a=y"), ("id=x",)])
def test_a_name_is_given_once_and_is_not_id(items: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="expected --ood NAME=DATA with a name of its own, got '.*': '.*' is taken"):
        parse_named_data(items)


def test_the_protocol_says_what_was_equalised() -> None:
    native, size, both = NamedData(), NamedData(via_size=32), NamedData(via_size=32, via_jpeg=75)
    assert [named.protocol for named in (native, size, both)] == ["native", "via32", "via32-jpeg75"]
    assert native.via is None and both.via == Via(32, 75)
    assert "as they are" in native.equalised and "codecs may" in size.equalised
    assert both.equalised == "every image first went through 32 px and one JPEG of quality 75"
    with pytest.raises(UsageError, match="via_jpeg needs a via_size"):
        NamedData(via_jpeg=75)


@pytest.mark.parametrize(("text", "via"), [("32", Via(32)), (" 224 ", Via(224)), ("32,jpeg75", Via(32, 75))])
def test_a_via_is_written_as_it_is_read(text: str, via: Via) -> None:
    assert parse_via(text) == via and str(via) == text.strip()


@pytest.mark.parametrize("text", ["", "x", "32,75", "32,jpeg", "32,jpeg75,jpeg20", "jpeg75", "-3", "32, png"])
def test_another_via_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="expected --via SIDE or SIDE,jpegQUALITY, such as 32 or 32,jpeg75"):
        parse_via(text)


@pytest.mark.parametrize(("text", "message"), [("0", "at least 1"), ("8,jpeg0", "1 to 95"), ("8,jpeg96", "1 to 95")])
def test_a_via_out_of_range_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_via(text)
