from __future__ import annotations

import pytest
from pydantic import ValidationError

from evaluation.errors import EvaluationError
from evaluation.profile.config import PRESETS, ProfileConfig


def test_one_point_keeps_the_plain_name() -> None:
    (point,) = ProfileConfig().points
    assert (point.task, point.batch_size, point.prompt_len, point.new_tokens) == ("profile", 1, 128, 32)
    assert ProfileConfig(batch_size=[4]) == ProfileConfig(batch_size=4)


def test_a_grid_is_all_combinations_by_name() -> None:
    points = ProfileConfig(batch_size=[1, 8], prompt_len=[16, 64], new_tokens=4).points
    assert [point.task for point in points] == [
        "profile b1 p16 n4",
        "profile b1 p64 n4",
        "profile b8 p16 n4",
        "profile b8 p64 n4",
    ]


def test_presets_are_written_out() -> None:
    paper = ProfileConfig.model_validate({"preset": "shortened_llama"})
    assert (paper.warmup, paper.runs) == (10, 20)
    assert len(paper.points) == 7 * 2
    assert paper.points[-1].task == "profile b256 p12 n512"
    assert "preset" not in paper.model_dump(mode="json")
    assert ProfileConfig.model_validate(paper.model_dump(mode="json")) == paper
    assert ProfileConfig.model_validate({"preset": "slimgpt_table4"}).runs == 50
    fewer = ProfileConfig.model_validate({"preset": "shortened_llama", "batch_size": [1, 2], "runs": 3})
    assert (fewer.batch_size, fewer.new_tokens, fewer.runs, fewer.warmup) == ((1, 2), (128, 512), 3, 10)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_ones_that_the_type_names(name: str) -> None:
    assert name in str(ProfileConfig.model_fields["preset"].annotation)


def test_an_unknown_preset_names_the_near_one() -> None:
    with pytest.raises(ValidationError, match="unknown preset 'Shortened-LLaMa2'; did you mean 'shortened_llama'"):
        ProfileConfig.model_validate({"preset": "Shortened-LLaMa2"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"runs": 0},
        {"batch_size": 0},
        {"batch_size": []},
        {"batch_size": [1, 1]},
        {"batch_size": [8, -1]},
        {"new_tokens": 0},
        {"prompt": 3},
        {"attn_implementation": "flash"},
        {"ratio_precision": 0},
        {"ratio_seconds": -1},
    ],
)
def test_a_senseless_config_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ProfileConfig.model_validate(wrong)


def test_lengths_are_compared_with_the_context() -> None:
    config = ProfileConfig(prompt_len=[16, 100], new_tokens=[1, 29])
    config.check_lengths(129)
    config.check_lengths(None)
    with pytest.raises(EvaluationError, match=r"prompt_len 100 \+ new_tokens 29 .* of 128; shorten"):
        config.check_lengths(128)
