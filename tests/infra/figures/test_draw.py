"""A drawing as a file: the same bytes for the same numbers, texts as they are, nothing lost in silence."""

from __future__ import annotations

import math
import warnings
from xml.etree import ElementTree

import pytest

from infra.figures.draw import draw
from infra.figures.panels import Drawing, HeatMap, Panel, Series, in_rows

ODD = "Größe & <script>alert(1)</script> 50%_x $\\frac{1}{$ \x00"


def curves(*series: Series, **options: object) -> Drawing:
    return Drawing("Title", ((Panel("Panel", "layer", "error (%)", series, **options),),), ("note",))  # type: ignore[arg-type]


def texts(svg: bytes) -> str:
    root = ElementTree.fromstring(svg)
    return "\n".join("".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text"))


def test_forms_are_what_they_say_and_the_same_each_time() -> None:
    line = Series("slimgpt", (0.0, 1.0, 2.0), (3.0, 1.0, 2.0), 0, names=("", "best", ""), spread=(0.1, None, math.nan))
    drawing = curves(line, Series("flap", (0.0, 2.0), (1.0, 4.0), 9, "dashed", hollow=True, crossed=(1,)))
    for form, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        first = draw(drawing, form)  # type: ignore[arg-type]
        assert first.startswith(start)
        assert first == draw(drawing, form)  # type: ignore[arg-type]
    shown = texts(draw(drawing, "svg"))
    for text in ("Title", "Panel", "layer", "error (%)", "note", "slimgpt", "flap", "best"):
        assert text in shown


def test_the_settings_of_the_user_change_nothing() -> None:
    import matplotlib

    drawing = curves(Series("a", (0.0, 1.0), (1.0, 2.0)))
    before = draw(drawing, "svg")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 5, "svg.fonttype": "path"}):
        assert draw(drawing, "svg") == before


def test_odd_names_are_texts() -> None:
    drawing = Drawing(
        ODD, ((Panel(ODD, ODD, ODD, (Series(ODD, (0.0, 1.0), (1.0, 2.0), names=(ODD, "")),), x_ticks=((0.0, ODD),)),),),
        (ODD,),
    )  # fmt: skip
    svg = draw(drawing, "svg")
    assert b"<script" not in svg
    assert "Größe & <script>alert(1)</script> 50%_x $\\frac{1}{$" in texts(svg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(curves(Series("模型 ☃ 🦙", (0.0,), (1.0,))), "png")


def test_what_no_axis_has_is_told() -> None:
    broken = Series("broken", (0.0, 1.0, 2.0, 3.0), (1.0, math.nan, math.inf, 900.0))
    shown = texts(draw(curves(broken, y_log=True, y_max=100.0), "svg"))
    assert "off the scale in Panel: broken nan, inf, 900" in shown
    nothing = curves(Series("zero", (0.0,), (0.0,)), y_log=True)
    assert "off the scale in Panel: zero 0" in texts(draw(nothing, "svg"))


@pytest.mark.parametrize("low, high, shown", [(5.0, 500.0, "200"), (1.0, 1e8, "10⁸"), (1e-6, 1e-4, "5·10⁻⁶")])
def test_logarithmic_axes_have_numbers_without_formulas(low: float, high: float, shown: str) -> None:
    svg = texts(draw(curves(Series("a", (0.0, 1.0), (low, high)), y_log=True), "svg"))
    assert shown in svg.splitlines()
    assert "$" not in svg


def test_long_notes_are_wrapped_and_long_names_cut() -> None:
    drawing = Drawing(
        "Title", ((Panel("", "x", "y", (Series("n" * 500, (0.0,), (1.0,)),)),),), ("word " * 200, "w" * 1000)
    )
    lines = texts(draw(drawing, "svg")).splitlines()
    assert max(map(len, lines)) < 250
    assert sum(line.count("word") for line in lines) == 200
    assert sum(line.count("w") for line in lines if set(line) == {"w"}) == 1000
    assert any(line.endswith("…") for line in lines)


def test_a_heat_map_has_its_numbers() -> None:
    heat = HeatMap(((1.0, 0.0), (0.5, math.nan)), ("0", "1"), "share", ("2/2", "1/1"), (("100", "0"), ("50",)))
    svg = draw(Drawing("Title", in_rows([Panel("Kept", "head", "layer", heat=heat)] * 3, 2)), "svg")
    shown = texts(svg).splitlines()
    for text in ("2/2", "1/1", "100", "50", "share"):
        assert text in shown


def test_a_figure_without_panels_is_refused() -> None:
    with pytest.raises(ValueError, match="without panels"):
        draw(Drawing("Title", ((None,),)), "svg")
