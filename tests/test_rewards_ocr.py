"""OCR similarity by hand-made cases, and edit distance by its laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visearch.rewards import check, resolve
from visearch.rewards.ocr import OCR, edit_distance, quoted, similarity

TEXT = st.text("abc ", max_size=8)


@pytest.mark.parametrize(
    ("read", "expected"),
    [("helloworld!!", 1.0), ("hallo world", 0.9), ("", 0.0), ("zxqjkvbzxqjkvbzxqjkvbzxqjkvb" * 2, 0.0)],
)
def test_similarity_to_hello_world(read, expected):
    assert similarity(read, "Hello World") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Stop Here", not "Go"', "Stop Here"),
        ("a sign", None),
        ('a 24" screen', None),
        ('an empty "" sign', None),
        ('a blank " " sign', None),
    ],
)
def test_the_first_quoted_text_counts(prompt, text):
    assert quoted(prompt) == text


@given(TEXT, TEXT, TEXT)
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@given(TEXT, st.integers(0, 8), st.sampled_from("abc"))
def test_one_letter_more_is_one_edit(text, place, letter):
    assert edit_distance(text, text[:place] + letter + text[place:]) == 1


def brightness(image: Image.Image) -> str:
    """A reader of grey images: their first pixel as a number."""
    return str(image.getpixel((0, 0))[0])


def test_images_are_read_one_by_one_and_a_prompt_without_text_fails():
    images = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (120, 121, 7)]
    scores = OCR(brightness).score(images, ['the number "120"', 'the number "120"', "a number"])
    assert scores.values.tolist() == pytest.approx([1, 2 / 3, math.nan], nan_ok=True)
    assert scores.reasons == {2: 'the prompt has no text in "double quotes"'}


def test_it_keeps_the_contract_of_rewards():
    """Colours of the default samples, read as their names or not at all."""

    def reader(image: Image.Image) -> str:
        r, g, b = image.resize((1, 1)).getpixel((0, 0))
        return "red" if r > g + b else "blue" if b > r + g else ""

    check(OCR(reader))


def test_readers_without_a_name_are_not_taken_for_each_other():
    assert OCR(brightness).config_hash == OCR(f"{__name__}:brightness").config_hash
    with pytest.raises(AttributeError, match="<lambda> has no name"):
        _ = OCR(lambda image: "").config_hash


def test_a_reader_is_needed_and_may_be_named():
    with pytest.raises(ValueError, match=r"reader=.*pytesseract:image_to_string"):
        resolve("ocr")
    reward = resolve(f"ocr:{__name__}:brightness")
    assert reward.score([Image.new("RGB", (8, 8))], '"0"').values.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"no module 'no_such_reader'"):
        OCR("no_such_reader:read")
