"""How close answers come to what was meant, as the field's libraries measure it."""

from collections.abc import Sequence
from typing import Any


def caption_metrics(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Figures of captions, compared without case and outer blanks.

    - `exact_match`: share of answers that are one of their references.
    - `BLEU-4` and `chrF`: of the whole corpus, 0 to 100 (sacrebleu).
    - `ROUGE-L`: F-measure that leans to recall (beta 1.2, as in the COCO evaluation), mean over answers, 0 to 1
      (pycocoevalcap).
    - `CIDEr`: mean over answers, weighed by how rare n-grams are among these references, 0 to 10 (pycocoevalcap).

    Args:
        said: the answers.
        references: one or more right answers for each.

    Raises:
        ValueError: no answer, or an answer without reference.
    """
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    answers, right = [plain(text) for text in said], [[plain(text) for text in texts] for texts in references]
    if not answers or len(answers) != len(right) or not all(right):
        raise ValueError(
            f"{len(answers)} answers and {len(right)} lists of references: give one or more for each answer"
        )
    most = max(map(len, right))
    # sacrebleu wants the first references of all answers, then the second ones ...
    columns: Any = [[texts[i] if i < len(texts) else None for texts in right] for i in range(most)]
    ids = range(len(answers))
    truth, given = dict(zip(ids, right, strict=True)), {i: [answers[i]] for i in ids}
    cider, _ = Cider().compute_score(truth, given)
    rouge, _ = Rouge().compute_score(truth, given)
    return {
        "exact_match": sum(answer in texts for answer, texts in zip(answers, right, strict=True)) / len(answers),
        "BLEU-4": sacrebleu.corpus_bleu(answers, columns).score,
        "ROUGE-L": float(rouge),
        "CIDEr": float(cider),
        "chrF": sacrebleu.corpus_chrf(answers, columns).score,
    }


def speech_metrics(said: Sequence[str], spoken: Sequence[str]) -> dict[str, float]:
    """`WER` and `CER`: words and characters changed, left out or put in, over those spoken (jiwer), without case.

    Args:
        said: the transcripts.
        spoken: what was said.
    """
    import jiwer

    heard, meant = [plain(text) for text in said], [plain(text) for text in spoken]
    return {"WER": float(jiwer.wer(meant, heard)), "CER": float(jiwer.cer(meant, heard))}


def plain(text: str) -> str:
    """A text as it is compared: without case and with single blanks."""
    return " ".join(text.casefold().split())
