"""Which class each image is of."""

import numpy as np
import pytest

from flowdcn_jax.sampling import Request, SamplingError, labels_in_turn
from flowdcn_jax.sampling.classes import (
    class_labels,
    class_words,
    imagenet_words,
    make_labels,
    parse_classes,
)

ANIMALS = (("cat", "feline"), ("dog", "pet"), ("7",), ("cow", "pet"))


def parse(*classes, words=ANIMALS):
    request = Request(classes=list(classes))
    return parse_classes(request.classes, len(words) if words else 3, words)


def test_names_other_words_and_numbers():
    assert parse("dog", " 0", "7", "FELINE", "3") == [1, 0, 2, 0, 3]
    assert parse("all") == [0, 1, 2, 3]
    assert parse("2", words=None) == [2]
    folders = (("Great_Dane",), ("great tit",))
    assert parse("Great_Dane", "great dane", "great_tit", words=folders) == [0, 0, 1]


@pytest.mark.parametrize("classes", ["3,7", [3, 7], ("3", 7), np.array([3, 7]), "3, 7"])
def test_classes_are_a_text_or_a_sequence(classes):
    assert Request(classes=classes).classes == ("3", "7")


def test_one_class_alone_may_be_given_as_it_is():
    assert Request(classes=3).classes == Request(classes="3").classes == ("3",)
    assert Request(classes="37").classes == ("37",)
    assert Request(classes="great dane").classes == ("great dane",)
    assert Request().classes is None


def test_a_name_with_a_comma_is_put_in_quotes():
    assert Request(classes='3, "dog, small",cat').classes == ("3", "dog, small", "cat")
    assert Request(classes=["dog, small", "cat"]).classes == ("dog, small", "cat")


@pytest.mark.parametrize("nothing", [[], "", [""], (), "3\n7"])
def test_no_class_is_not_every_class(nothing):
    with pytest.raises(SamplingError, match="^classes is .*; expected names and numbers"):
        Request(classes=nothing)


@pytest.mark.parametrize(
    "texts, words, message",
    [
        (["bird"], ANIMALS, r"'bird'; expected numbers from 0 to 3, or names \(cat, dog, 7, cow\)"),
        (["pet"], ANIMALS, r"'pet' stands for dog \(1\), cow \(3\)"),
        (["4"], ANIMALS, "'4'; expected numbers from 0 to 3"),
        (["cow"], None, "'cow'; expected numbers from 0 to 2$"),
        (["-1"], None, "'-1'; expected numbers from 0 to 2$"),
        (["cat", ""], ANIMALS, "''; expected"),
        ([True], ANIMALS, "'True'; expected numbers"),
    ],
)
def test_what_is_not_a_class(texts, words, message):
    with pytest.raises(SamplingError, match=message):
        parse(*texts, words=words)


def test_imagenets_names():
    words = imagenet_words()
    names = [name for name, *_ in words]
    assert len(words) == 1000 and len({name.lower() for name in names}) == 1000
    assert all(word and word == word.strip() for row in words for word in row)
    for number, name in {
        0: "tench",
        207: "golden retriever",
        360: "otter",
        999: "toilet tissue",
    }.items():
        assert names[number] == name
    assert parse("golden_retriever", "Lesser Panda", "crane (machine)", words=words) == [
        207,
        387,
        517,
    ]


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("retriever", "flat-coated retriever, curly-coated retriever, golden retriever"),
        ("golden retreiver", "golden retriever"),
        ("panda", r"stands for lesser panda \(387\), giant panda \(388\)"),
        ("crane", r"crane \(bird\), crane \(machine\)"),
    ],
)
def test_the_nearest_of_imagenets_names_are_given(text, nearest):
    with pytest.raises(SamplingError, match=nearest):
        parse(text, words=imagenet_words())


def test_where_names_come_from():
    assert class_words(3, ("a", "b", "c")) == (("a",), ("b",), ("c",))
    assert class_words(10, None) is None
    assert class_words(1000, None) == imagenet_words()
    numbers = tuple(f"n{i:08d}" for i in range(1000))
    assert class_words(1000, numbers) == imagenet_words()
    assert class_words(1000, tuple(f"{number}_a_word" for number in numbers)) == imagenet_words()
    assert class_words(1000, ("cat", *numbers[1:]))[0] == ("cat",)
    assert class_words(2, numbers[:2]) is None
    assert class_words(2, ("n01440764_tench", "n01443537_goldfish"))[0] == ("n01440764_tench",)
    assert class_labels(np.array([1, 2]), ANIMALS) == ["dog", "7"]
    assert class_labels(np.array([1, 2]), None) == ["1", "2"]


def test_labels_in_turn_and_at_random():
    assert labels_in_turn((3, 7), 5, 10).tolist() == [3, 7, 3, 7, 3]
    assert labels_in_turn((), 4, 3).tolist() == [0, 1, 2, 0]
    assert make_labels("balanced", (3, 7), 3, 10, seed=0).tolist() == [3, 7, 3]
    drawn = make_labels("random", (), 3000, 10, seed=0)
    assert np.abs(np.bincount(drawn, minlength=10) - 300).max() < 80
    np.testing.assert_array_equal(drawn, make_labels("random", (), 3000, 10, seed=0))
    assert (drawn != make_labels("random", (), 3000, 10, seed=1)).any()
    assert set(make_labels("random", (3, 7), 50, 10, seed=0)) == {3, 7}
    with pytest.raises(SamplingError, match="labels is 'sorted'"):
        Request(labels="sorted")
