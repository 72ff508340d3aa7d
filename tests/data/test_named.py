"""NAME=DATA, as --ood takes it."""

from __future__ import annotations

import pytest

from ssod_edge.data.named import NamedData, parse_named_data
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


def test_the_protocol_is_named_after_the_size() -> None:
    assert [NamedData(via_size=size).protocol for size in (None, 32)] == ["native", "via32"]
