"""The contract language: what parses, how sizes bind, what the messages say."""

import pytest

from opreg.shapes import Binding, Mismatch, ShapeSyntaxError, parse


def bind(*pairs, **known):
    binding = Binding(known)
    for index, (text, sizes) in enumerate(pairs):
        binding.bind("xyz"[index], parse(text), sizes)
    return binding


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        ("t h d", (3, 4, 5), {"t": 3, "h": 4, "d": 5}),
        ("*n d", (2, 3, 8), {"n": (2, 3), "d": 8}),
        ("*n d", (8,), {"n": (), "d": 8}),
        ("b *n d", (1, 2, 3, 4), {"b": 1, "n": (2, 3), "d": 4}),
        ("... d", (7, 8), {"...": (7,), "d": 8}),
        ("_ 128", (5, 128), {}),
        ("*_ d", (5, 6, 7), {"d": 7}),
        ("", (), {}),
        ("s s+1", (4, 5), {"s": 4}),
        ("a b a*b-1 b//2", (3, 4, 11, 2), {"a": 3, "b": 4}),
    ],
)
def test_binds(text, sizes, expected):
    assert bind((text, sizes)).sizes == expected


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("n d", (4, 8)), ("d", (7,))], "dim 'd' is 7 in y but 8 in x"),
        ([("t h d", (4, 8))], "x has 2 dims but 't h d' has 3"),
        ([("a *n d", (4,))], "x has 1 dims but 'a *n d' needs at least 2"),
        ([("_ 128", (4, 64))], "'_ 128' wants 128 but x has 64"),
        ([("*n d", (2, 3, 8)), ("*n", (2, 4))], "dims '*n' are [2, 4] in y but [2, 3] in x"),
        ([("*n d", (2, 3, 8)), ("*n", (2,))], "dims '*n' are [2] in y but [2, 3] in x"),
        ([("s", (4,)), ("s+1", (4,))], "dim 's+1' is 5 (s=4) but 4 in y"),
    ],
)
def test_says_what_differs(pairs, message):
    with pytest.raises(Mismatch) as caught:
        bind(*pairs)
    assert str(caught.value) == message


def test_integer_arguments_are_sizes_too():
    assert bind(("t h", (4, 8)), h=8).output(parse("t h*2")) == [4, 16]
    with pytest.raises(Mismatch, match="dim 'h' is 8 in x but 6 in the arguments"):
        bind(("t h", (4, 8)), h=6)


def test_outputs_are_computed():
    binding = bind(("*n t d", (2, 3, 4, 5)))
    assert binding.output(parse("*n d t")) == [2, 3, 5, 4]
    assert binding.output(parse("t*d d-1 7")) == [20, 4, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*a *b", "more than one"),
        ("*1", "followed by a name"),
        ("h?", "neither a name"),
        ("h**2", "only names, integers"),
        ("f(h)", "only names, integers"),
        ("__import__('os')", "only names, integers"),
        ("h/2", "only names, integers"),
        ("1.5", "only names, integers"),
    ],
)
def test_refuses_what_it_cannot_read(text, message):
    with pytest.raises(ShapeSyntaxError, match=message):
        parse(text)
