"""Frozen facts: what a frozen dataclass is to who uses one."""

import copy
import pickle
from typing import Any

import pytest

from opreg import facts
from opreg.facts import Fact, replace


class Point(Fact, apart=("said",)):
    x: int
    y: int = 2
    said: str = ""


class Other(Fact):
    x: int
    y: int = 2
    said: str = ""


def test_facts_are_made_by_place_and_name_and_compare_by_value() -> None:
    one = Point(1)
    assert (one.x, one.y, one.said) == (1, 2, "")
    assert one == Point(x=1, y=2) == Point(1, 2, said="here")
    assert hash(one) == hash(Point(1, said="there"))
    assert one != Point(2)
    assert one != Other(1)
    assert one != (1, 2, "")
    assert repr(one) == "Point(x=1, y=2, said='')"
    assert replace(one, y=5, said="far") == Point(1, 5)
    assert one.y == 2
    assert {one: 1}[Point(1)] == 1
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one


def test_facts_do_not_change() -> None:
    one = Point(1)
    with pytest.raises(AttributeError, match="'x' of a Point cannot change"):
        one.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="'x' of a Point cannot be deleted"):
        del one.x
    with pytest.raises(AttributeError):
        one.new = 3  # type: ignore[attr-defined]
    assert vars(one) == {"x": 1, "y": 2, "said": ""}


@pytest.mark.parametrize(
    ("values", "named", "match"),
    [
        ((), {}, "Point needs 'x'"),
        ((1, 2, "", 4), {}, "Point has 3 attributes, not 4"),
        ((1,), {"x": 2}, "Point: unknown or given twice: x"),
        ((1,), {"z": 2}, "Point: unknown or given twice: z"),
    ],
)
def test_wrong_attributes_are_named(values: tuple[Any, ...], named: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        Point(*values, **named)


def test_a_default_is_no_attribute_of_the_class() -> None:
    """Else an object that is made when somebody looks (later.py) would show the default in place of its own."""
    assert not hasattr(Point, "y")
    assert not [name for name in vars(facts.Fact) if not name.startswith("_")]
