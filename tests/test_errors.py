from __future__ import annotations

from tune_sparse.errors import InputError, unknown_name


def test_the_closest_names_come_before_all_of_them() -> None:
    message = str(unknown_name("task", "bolq", ["hellaswag", "gsm8k", "boolq"]))
    assert message == "unknown task 'bolq'. Did you mean 'boolq'? Known: boolq, gsm8k, hellaswag."


def test_the_closest_of_several_close_names_is_first() -> None:
    message = str(unknown_name("mode", "sparse-to-spare", ["sparse-to-dense", "dense", "sparse-to-sparse"]))
    assert "Did you mean 'sparse-to-sparse' or 'sparse-to-dense'?" in message


def test_a_name_like_no_other_gets_no_guess() -> None:
    message = str(unknown_name("task", "zzz", ["boolq"]))
    assert message == "unknown task 'zzz'. Known: boolq."


def test_a_name_that_is_not_text_is_still_reported() -> None:
    assert str(unknown_name("task", 5, ["boolq"])) == "unknown task 5. Known: boolq."  # type: ignore[arg-type]


def test_an_unknown_name_is_the_users_mistake() -> None:
    assert isinstance(unknown_name("task", "x", ["y"]), InputError)
    assert issubclass(InputError, ValueError)
