"""Text metrics against values worked out by hand, and against the libraries' own."""

import pytest

from edge_glass.evaluation.names import AnswerName
from edge_glass.evaluation.text import caption_metrics, speech_metrics


def test_a_perfect_answer_has_perfect_figures():
    said = ["a black cat on a red sofa", "two dogs run in the green park"]
    found = caption_metrics(said, [[text] for text in said])
    assert found == pytest.approx({"exact_match": 1.0, "BLEU-4": 100.0, "ROUGE-L": 1.0, "CIDEr": 10.0, "chrF": 100.0})
    assert speech_metrics(said, said) == {"WER": 0.0, "CER": 0.0}


def test_case_and_blanks_do_not_count_and_any_reference_will_do():
    found = caption_metrics(["  Cat  FACE", "dog"], [["feline", "cat face"], ["cow"]])
    assert found["exact_match"] == 0.5


def test_rouge_is_the_longest_common_subsequence_with_the_closest_reference():
    # "the cat sat" in "the cat has sat": 3 of 3 words said are right, 3 of 4 wanted are said.
    found = caption_metrics(["the cat sat"], [["nothing alike", "the cat has sat"]])
    assert found["ROUGE-L"] == pytest.approx((1 + 1.2**2) * 1.0 * 0.75 / (0.75 + 1.2**2 * 1.0))


def test_bleu_is_of_four_words_and_penalises_short_answers():
    reference = [["the quick brown fox jumps over it"]]
    whole = caption_metrics(["the quick brown fox jumps over it"], reference)["BLEU-4"]
    short = caption_metrics(["the quick brown fox"], reference)["BLEU-4"]
    assert whole == pytest.approx(100.0) and short == pytest.approx(100 * 2.718281828 ** (1 - 7 / 4), rel=1e-6)


def test_rare_words_weigh_more_in_cider():
    references = [["a cat"], ["a dog"], ["a cow"], ["a hen"]]
    rare = caption_metrics(["the cat", "a dog", "a cow", "a hen"], references)["CIDEr"]
    common = caption_metrics(["a bat", "a dog", "a cow", "a hen"], references)["CIDEr"]
    assert rare > common  # "cat" is in one caption, "a" in all


def test_wrong_words_and_letters_are_counted_over_those_spoken():
    # One of three words changed, one put in; 9 letters and 2 blanks spoken.
    found = speech_metrics(["one too three four"], ["one two three"])
    assert found["WER"] == pytest.approx(2 / 3)
    assert found["CER"] == pytest.approx((1 + 5) / 13)
    assert speech_metrics([""], ["one"]) == {"WER": 1.0, "CER": 1.0}


@pytest.mark.parametrize(("said", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_answers_without_references_are_refused(said, references):
    with pytest.raises(ValueError, match="give one or more for each answer"):
        caption_metrics(said, references)


@pytest.mark.parametrize(
    "name",
    [
        AnswerName("test", "image", "exact_match"),
        AnswerName("val", "image_audio", "loss_shuffled_prefix"),
        AnswerName("test", "audio", "WER", of="flite_awb"),
        AnswerName("test", "image", "BLEU-4"),
        AnswerName("test", "image", "loss"),
    ],
)
def test_a_figures_name_is_read_as_it_was_written(name):
    assert AnswerName.parse(str(name)) == name


@pytest.mark.parametrize("name", ["loss", "test/image_to_text/R@1", "test/image_caption/rank", "test/mean/exact_match"])
def test_names_of_other_figures_are_none_of_answers(name):
    assert AnswerName.parse(name) is None
