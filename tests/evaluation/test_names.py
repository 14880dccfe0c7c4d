import pytest

from edge_glass.evaluation.names import MetricName


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("test/image_to_text/R@1", MetricName("test", "image", "text", "R@1")),
        ("test/image_to_text/R@1@128", MetricName("test", "image", "text", "R@1", 128)),
        ("test/image_to_text/R@10@128", MetricName("test", "image", "text", "R@10", 128)),
        ("val/text_to_audio/group_R@1@64", MetricName("val", "text", "audio", "group_R@1", 64)),
        ("test/audio_to_text/R@1/flite_awb", MetricName("test", "audio", "text", "R@1", None, "flite_awb")),
        ("v/audio_to_image/mAP/nearest/a@5", MetricName("v", "audio", "image", "mAP", None, "nearest/a@5")),
    ],
)
def test_a_metric_name_survives_writing_and_reading(text, name):
    assert MetricName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize("text", ["loss", "lr", "val/mean/R@1", "test/image_to_text/queries", "image_to_text/R@1"])
def test_other_figures_are_not_taken_for_retrieval_metrics(text):
    assert MetricName.parse(text) is None
