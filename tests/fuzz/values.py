"""Values that a spec does not expect, as YAML, and the places of a spec to put them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from hypothesis import strategies as st

from flows.spec.load import dump_spec, load_spec

#: one of everything that a spec may hold, so that each option is a place
EVERYTHING = (
    "evals=[{suite: perplexity, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 8},"
    " {suite: agreement, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 8},"
    " {suite: zero_shot, tasks: [piqa], limit: 10}]",
    "steps=[{method: slimgpt, sparsity: 0.2, variants: {a: {curve: uniform}, b: {calibration: {seq_len: 32}}}},"
    " {recovery: lora, data: {dataset: slimline/instructions}, num_examples: 32, max_steps: 4, batch_size: 4,"
    " max_length: 256, dtype: float32}]",
)
_NUMBERS = (
    *("0", "-0.0", "1", "2", "-1", "0.5", "1.5", "1e-308", "5e-324", "1e30", "1e308", ".nan", ".inf", "-.inf"),
    *("1000000", str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64), str(-(2**63) - 1), str(10**30)),
    *("1.0e+400", "9" * 400, "9" * 4301, "0.999999", "0.9999999999999999999", "0x10", "0o17", "0b11", "1_0", "1:30"),
    *("3.0000000000000001", "'3'", "'1e3'", "'nan'"),
)
_WORDS = (
    *("true", "false", "null", "yes", "on", "auto", "all", "max", "dense", "abc", "''", "' '", "'a b'", "é", "日本"),
    *(r'"\0"', r'"a\nb"', r'"\e[31mred"', r'"\u202e"', r'"\ud800"', "'%s %d {x} {}'", "'*'", "'['", "'[[:x'"),
    *("a" * 256, "a" * 5000, "'{{ x }}'", "$HOME", "'-'", "'--help'", "'a=b'", "'x:y'", "'🙂'"),
)
_PATHS = (
    *("/", ".", "..", "~", "~nobody/x", "./x", "../../../x", "/dev/null", "/dev/zero", "/dev/tty", "/proc/self/mem"),
    *("/etc/passwd", "/" + "a" * 300, "/" + "a/" * 3000, "a/b/c", "a//b", "/a/../..", "slimline/news", "s3://x/y"),
    *("https://example.org/x", "hf://x", "file:///etc/passwd", "C:\\x", "-/-", "x/.", "owner/na me"),
)
_SHAPES = (
    *("[]", "{}", "[null]", "[[]]", "[1, 1]", "[0]", "[64, 64]", "[.nan, .nan]", "{a: {b: c}}", "{a: 1}", "{1: 2}"),
    *("{null: 1}", "{'': 1}", "{[1]: 2}", "{true: false}", "2020-01-01", "2020-99-99", "2020-01-01T00:00:00Z"),
    *("!!binary aGk=", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp x", "!!int x", "!!float ''"),
    *("!!python/object:os.system x", "!x y", "&a [*a]", "&a {b: *a}", "*a", "[" * 2000, "[" * 300 + "]" * 300),
    *("{a: " * 300 + "}" * 300, "- a", "a: b: c", "? x", "|", "> a", "%TAG", "---", "'", '"', "\t", "{", "@", "`"),
    *("<<: {a: 1}", "{<<: [1]}", "{<<: {sparsity: 0.1}}", "[a" + ", a" * 3000 + "]"),
)

values = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_NUMBERS),
    st.sampled_from(_WORDS),
    st.sampled_from(_PATHS),
    st.sampled_from(_SHAPES),
    st.lists(st.sampled_from((*_NUMBERS[:-4], "a", "null", "true")), max_size=3).map(
        lambda items: f"[{', '.join(items)}]"
    ),
    st.text(max_size=12),
)

odd: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from((None, True, False, 0, -1, 1, 2, 10**30, 2**63, -0.5, 1e308, float("nan"), float("inf"), "", "x")),
    st.sampled_from(([], {}, [[]], {"a": 1}, [None], "a" * 3000, "\0", "\ud800", "../x", "llama", [1, "a"], {"": {}})),
    st.integers(),
    st.text(max_size=8),
)
"""Values of JSON that nobody expects."""


def places(spec: str, overrides: tuple[str, ...] = EVERYTHING) -> list[str]:
    """Every key and entry of a spec in which all defaults are written out, as `--set` names them."""
    return list(_paths(yaml.safe_load(dump_spec(load_spec(spec, overrides)))))


def _paths(node: Any, place: str = "") -> Iterator[str]:
    if place:
        yield place
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in entries:
        yield from _paths(inner, f"{place}.{key}".lstrip("."))
