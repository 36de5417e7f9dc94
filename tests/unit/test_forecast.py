"""What a stream holds first: about what the longest of a model's last answers had."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.forecast import LEAST_SAMPLES, LEAST_TOKENS, UNKNOWN_TOKENS, OutputForecast


def forecast_of(*lengths: int) -> OutputForecast:
    forecast = OutputForecast()
    for length in lengths:
        forecast.add("m", length)
    return forecast


def test_of_an_unknown_model_a_usual_answer_is_expected() -> None:
    assert forecast_of().expected("m", 10_000) == UNKNOWN_TOKENS
    assert forecast_of(*[5000] * (LEAST_SAMPLES - 1)).expected("m", 10_000) == UNKNOWN_TOKENS


def test_nearly_all_answers_are_within_what_is_expected() -> None:
    assert forecast_of(*range(1000, 1100)).expected("m", 10_000) == 1099
    assert forecast_of(*[100] * 199, 9000).expected("m", 10_000) == 100


def test_what_was_long_ago_is_forgotten() -> None:
    assert forecast_of(*[5000] * 300, *[100] * 300).expected("m", 10_000) == 100


def test_each_model_is_known_by_its_own_answers() -> None:
    assert forecast_of(*[1000] * 50).expected("other", 10_000) == UNKNOWN_TOKENS


def test_a_new_answer_changes_what_is_expected() -> None:
    forecast = forecast_of(*[100] * 50)
    assert forecast.expected("m", 10_000) == 100
    forecast.add("m", 700)
    assert forecast.expected("m", 10_000) == 700


@given(st.lists(st.integers(0, 10**6), max_size=400), st.integers(1, 10**6))
def test_no_more_than_the_limit_and_hardly_less_than_a_little(lengths: list[int], most: int) -> None:
    assert min(LEAST_TOKENS, most) <= forecast_of(*lengths).expected("m", most) <= most
