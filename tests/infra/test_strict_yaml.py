"""YAML that says something twice, or something that nobody meant, is one sentence with the line; the rest is read."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import yaml

from infra.errors import YamlInvalid
from infra.strict_yaml import load_yaml


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("steps: [1]\nname: x\nsteps: [2]\n", "steps", (1, 3)),
        ("a:\n- b: 1\n  c: 2\n  b: 1\n", "b", (2, 4)),
        ("a: {b: 1,\n    c: 2,\n    b: 3}\n", "b", (1, 3)),
        ("'a': 1\n\"a\": 2\n", "a", (1, 2)),
        ("on: 1\non: 2\n", "on", (1, 2)),
        ("1: a\n1: b\n", "1", (1, 2)),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  d: 1\n  d: 2\n", "d", (4, 5)),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(text: str, key: str, lines: tuple[int, int]) -> None:
    with pytest.raises(YamlInvalid) as caught:
        load_yaml(text)
    assert str(caught.value) == (
        f"the key {key!r} is there twice, in line {lines[0]} and in line {lines[1]}; take one of them out"
    )
    assert caught.value.line == lines[1]
    assert yaml.safe_load(text), "what others read it as"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n",
        "a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b}\nd: {<<: [*a, *b], x: 0}\n",
        # resolved before the mapping that it is taken from, which then has its own x twice
        "p: {a: &a {<<: {x: 2}, x: 1}}\nc: {<<: *a}\n",
        "a: [{x: 1}, {x: 2}]\nb: {x: {x: 1}}\n",
        "a: {x: 1, X: 2, 'x ': 3, 1: 1, '1': 2}\n",
    ],
)
def test_merge_keys_and_keys_of_other_mappings_are_no_repetition(text: str) -> None:
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"), ("yes", "yes"), ("No", "No"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("2024-01-01", "2024-01-01"), ("2024-13-45", "2024-13-45"), ("1:30", "1:30"),
        ("0123", "0123"), ("010", "010"), ("0", 0), ("-7", -7), ("1_000", 1000), ("0x1f", 31), ("0b11", 3),
        ("1e-4", 1e-4), ("-2E+3", -2e3), ("1.5e3", 1500.0), ("2.5e-1", 0.25), (".5", 0.5), ("3.", 3.0), ("1.25", 1.25),
        ("-.inf", float("-inf")), (".5e1", 5.0), ("1234e56", "1234e56"), ("e5", "e5"), (".", "."), ("-", [None]),
        ("1.2.3", "1.2.3"), ("./a", "./a"), ("=", "="), ("\ufeffa: 1", {"a": 1}), ("é", "é"),
        ("[a, 1e-3]", ["a", 1e-3]), ("''", ""), ("[a, '']", ["a", ""]),
    ],
)  # fmt: skip
def test_a_word_is_a_word_and_a_number_a_number(text: str, value: Any) -> None:
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)
    assert load_yaml(text.encode()) == value


def test_what_numbers_were_is_what_they_are() -> None:
    text = "[1, 0.5, 1.5, -2, +3, 12_5, 1.0e+3, .inf, .NaN, 0.0001, 6e2, true, text, 1a, a1, 1.e+2, 100000]"
    assert repr(load_yaml(text)) == repr(yaml.safe_load(text))


def test_bytes_of_windows_editors_are_read() -> None:
    assert load_yaml("a: é\r\nb: 2\r\n".encode("utf-16")) == {"a": "é", "b": 2}
    assert load_yaml("a: é\r\nb: 2\r\n".encode("utf-8-sig")) == {"a": "é", "b": 2}
    with pytest.raises(UnicodeDecodeError):
        load_yaml(b"a: \xe9")


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("a: &a [*a]", "an anchor stands for something that it lies in", 1),
        ("b: 1\na: &a {b: {c: *a}}", "an anchor stands for something that it lies in", 2),
        (laughs(30), "its anchors stand for millions of values", 6),
        ("[" * 5000, "more than 100 levels of brackets", 1),
        ("- " * 5000, "more than 100 levels of brackets", 1),
        ("a: 1\n---\na: 2", "expected a single document in the stream, but found another document", 2),
        ("a: 1\n\tb: 2", "found character '\\t'", 2),
        ("a: 1\nb: c\0d", "the character '\\x00' cannot be in it", 2),
        ("a: 1\n? [b]\n: c", "found unhashable key", 2),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor", 1),
        ("a: !!int x", "'x' is no int", 1),
        ("a: !!bool x", "'x' is no bool", 1),
        ("a: !!timestamp x", "'x' is no timestamp", 1),
        (f"a: {'9' * 5000}", "is no int", 1),
        ('a: "\\ud83d"', "is no str", 1),
        ("a: [b", "expected ',' or ']'", 1),
        ("a: *b", "found undefined alias 'b'", 1),
    ],
)
def test_a_trap_is_one_sentence(text: str, problem: str, line: int) -> None:
    with pytest.raises(YamlInvalid) as caught:
        load_yaml(text)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.line == line
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.line) == (str(caught.value), line)


def test_dask_can_hand_on_what_a_deep_document_raised() -> None:
    tblib = pytest.importorskip("tblib.pickling_support")  # Dask installs it: traces and causes are pickled too
    with pytest.raises(YamlInvalid) as caught:
        load_yaml("[" * 5000)
    tblib.install(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_anchors_in_reason_are_read() -> None:
    assert len(load_yaml(laughs(4))["a3"]) == 10
