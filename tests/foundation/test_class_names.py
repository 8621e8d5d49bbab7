"""Names of classes: two lists are the same in names and order, and a user may give a name or a number."""

import pytest
from refusals import sentence_of_error

from cdm_lightning.foundation.class_names import check_same_classes, class_number, numbers_in

NAMES = ["T-shirt", "ankle boot", "bag", "7"]


def test_lists_that_differ_in_names_or_order_are_refused():
    for unknown in (None, NAMES, tuple(NAMES)):
        check_same_classes(NAMES, unknown, "a", "b")
        check_same_classes(unknown, NAMES, "a", "b")
    cases = [
        (NAMES[:3], "a has 4 classes, and b 3"),
        (["T-shirt", "boot", "bag", "7"], "a calls class 1 'ankle boot', and b 'boot'"),
        (["T-shirt", "bag", "ankle boot", "7"], "and b 'bag': the names are the same, in another order"),
    ]
    for others, sentence in cases:
        said = sentence_of_error(lambda o=others: check_same_classes(NAMES, o, "a", "b"), sentence)
        assert ("another order" in said) == (sorted(others) == sorted(NAMES))


def test_numbers_of_one_list_are_found_in_another_by_name():
    assert numbers_in(NAMES, ["bag", "7", "coat", "T-shirt"], [1, 1, 0, 1], "x", "y") == [2, 3, -1, 0]
    call = lambda: numbers_in(NAMES, ["bag", "coat"], [0, 1], "x", "y")  # noqa: E731
    sentence_of_error(call, "x holds images of class 'coat', which is none of y: T-shirt, ankle boot, bag, 7")


def test_a_class_is_given_by_name_or_number_and_a_name_goes_first():
    assert [class_number(word, NAMES) for word in ("bag", "ankle boot", "2", "7", "12", "-1")] == [2, 1, 2, 3, 12, -1]
    assert class_number("7", None) == 7


@pytest.mark.parametrize(
    "word, names, sentence",
    [
        ("Bags", NAMES, "class 'Bags' is none of this cascade's classes: did you mean 'bag'?"),
        ("t-shirt", NAMES, "did you mean 'T-shirt'?"),
        ("zebra", NAMES, "classes: T-shirt, ankle boot, bag, 7"),
        ("zebra", [f"class {k}" for k in range(12)], "class 9 and 2 more"),
        ("bag", None, "class 'bag' is no number, and the names of this cascade's classes are not known"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(word, names, sentence):
    sentence_of_error(lambda: class_number(word, names), sentence)
