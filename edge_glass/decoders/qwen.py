"""A language model of transformers as decoder: Qwen and its kin, small and trained whole, or pretrained with LoRA."""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from edge_glass.data.batch import Dialogue
from edge_glass.decoders.decoder import AnswerLoss, LanguageDecoder, Sampling
from edge_glass.encoders.tokens import Tokens
from edge_glass.encoders.weights import WeightsNotFound, checked_options, load_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA = ("r", "alpha", "dropout", "target_modules")
ADAPTER = "default"  # peft's name for the only adapter of a model
CHECKPOINTING = {"use_reentrant": False}  # the other kind gives LoRA no gradient where no input asks for one


class QwenDecoder(LanguageDecoder):
    """Any causal language model of transformers that takes position ids.

    Args:
        tokenizer: see `LanguageDecoder`.
        backbone: the language model, or a peft model with one LoRA around it.
        adapted: whether the language model stays as it was loaded.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping what it computed.

    Raises:
        ValueError: a tokenizer with more tokens than the model has embeddings.
    """

    backbone: PreTrainedModel | PeftModel

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        backbone: PreTrainedModel | PeftModel,
        adapted: bool,
        gradient_checkpointing: bool = False,
    ):
        model = _without_peft(backbone)
        embeddings = cast(nn.Embedding, model.get_input_embeddings())
        if len(tokenizer) > embeddings.num_embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and {type(model).__name__} embeddings for "
                f"{embeddings.num_embeddings}: give the tokenizer of the same checkpoint"
            )
        super().__init__(tokenizer, width=embeddings.embedding_dim, adapted=adapted)
        self.backbone = backbone
        if gradient_checkpointing:
            with _no_warnings_of_new_names():
                model.gradient_checkpointing_enable(CHECKPOINTING)

    @classmethod
    def from_config(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model_type: str = "qwen2",
        gradient_checkpointing: bool = False,
        **options,
    ) -> "QwenDecoder":
        """A language model with random weights, to be trained whole.

        Args:
            tokenizer: its size is the model's vocabulary.
            model_type: transformers' name of the architecture, such as `qwen2` or `llama`.
            gradient_checkpointing: see `QwenDecoder`.
            **options: of the architecture's config class, such as `hidden_size` and `num_hidden_layers`.

        Raises:
            ValueError: a model type that is no causal language model, or an unknown option.
        """
        options = checked_options(model_type, options)
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"{model_type!r} is no causal language model; 'qwen2', 'llama' and others are")
        given = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if twice := sorted(options.keys() & given.keys()):
            raise ValueError(f"{', '.join(twice)}: leave this to the tokenizer, which says {given[twice[0]]}")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options, **given))
        return cls(tokenizer, model, adapted=False, gradient_checkpointing=gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        lora: dict | None = None,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa",
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ) -> "QwenDecoder":
        """The language model of a checkpoint, which stays as it is, with LoRA (Hu et al. 2021) to train or without.

        Quantised models live on the current GPU if there is one, else on the CPU.

        Args:
            tokenizer: of the same checkpoint.
            name: a folder, `package:<package>/<folder>`, or a hub name.
            load_in_8bit: keep the linear layers in 8 bits: LLM.int8() (Dettmers et al. 2022).
            load_in_4bit: keep them in 4 bits: NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023).
            lora: `r`, `alpha`, `dropout` and `target_modules` (names of linear layers, or `all-linear`); null trains
                nothing.
            gradient_checkpointing: see `QwenDecoder`.
            attention: which implementation; `flash_attention_2` needs a GPU and the package flash_attn.
            dtype: of the weights; `auto` is the checkpoint's own. In a quantised model it is the type that 4-bit
                layers compute in, and what is not quantised is in fp32.

        Raises:
            WeightsNotFound: no such checkpoint, or none in safetensors.
            ValueError: arguments that do not go together, LoRA for layers that are not there, or a checkpoint that
                lacks weights of the model.
        """
        _check_choices(load_in_8bit, load_in_4bit, attention, dtype)

        def load(source: str) -> PreTrainedModel:
            found = AutoConfig.from_pretrained(source).dtype or torch.float32
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                use_safetensors=True,
                dtype=DTYPES.get(dtype, found),
                attn_implementation=attention,
                quantization_config=_quantisation(load_in_8bit, load_in_4bit, DTYPES.get(dtype, found)),
                output_loading_info=True,
            )
            model, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise ValueError(
                    f"The checkpoint {source!r} lacks {len(missing)} weights of {type(model).__name__}, "
                    f"such as {missing[0]!r}: is it a checkpoint of another model?"
                )
            return model

        model = load_checkpoint(name, load)
        model.name_or_path = model.config.name_or_path = name  # not the folder of a cache: an adapter names it
        model.requires_grad_(False)
        if load_in_8bit or load_in_4bit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if lora is None:
            return cls(tokenizer, model, adapted=True, gradient_checkpointing=gradient_checkpointing)
        with _no_warnings_of_new_names():
            backbone = get_peft_model(model, _lora_config(model, lora, name))
        return cls(tokenizer, backbone, adapted=True, gradient_checkpointing=gradient_checkpointing)

    @property
    def language_model(self) -> Any:
        """The transformers model itself; LoRA, if there is any, works inside it."""
        return _without_peft(self.backbone)

    def forward(self, prefix: Tokens, text: Dialogue) -> AnswerLoss:
        """The loss of the answers; see `LanguageDecoder`.

        Logits are computed where any sample's answer is predicted from, and nowhere else.

        Raises:
            ValueError: an answer with nothing before it, or a prefix of another width.
        """
        sequence, real = self._sequence(prefix, text)
        samples, places = text.answer.nonzero(as_tuple=True)
        origins = _real_before(real)[samples, prefix.mask.shape[1] + places]
        if (origins < 0).any():
            raise ValueError("an answer has neither prefix nor prompt before it: give one, to predict its start from")
        kept, column = origins.unique(return_inverse=True)
        logits = self.language_model(
            inputs_embeds=sequence,
            attention_mask=real.long(),
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=kept,
        ).logits[samples, column]  # [answer tokens, vocabulary]
        nll = cross_entropy(logits.float(), text.ids[text.answer], reduction="none")
        spread = nll.new_zeros(text.answer.shape).masked_scatter(text.answer, nll)  # [batch, tokens]
        return AnswerLoss(nll=spread.sum(1), extra=nll.new_zeros(len(text)))

    @torch.no_grad()
    def generate(self, prefix: Tokens, text: Dialogue, sampling: Sampling) -> list[str]:
        """An answer to each prompt; see `LanguageDecoder`. `sampling` alone decides, not the checkpoint's settings."""
        model, was_training = self.language_model, self.training
        # transformers would fill in from here what a call leaves open, such as Qwen's own repetition penalty.
        settings, model.generation_config = model.generation_config, GenerationConfig()
        self.eval()
        try:
            sequence, real = self._sequence(prefix, text)
            drawn = model.generate(
                inputs_embeds=sequence,
                attention_mask=real.long(),
                generation_config=self._generation(sampling),
                stopping_criteria=StoppingCriteriaList([_Says(self.tokenizer, sampling.stop)] if sampling.stop else []),
            )
        finally:
            model.generation_config = settings
            self.train(was_training)
        answers = self.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        return [_before(answer, sampling.stop).strip() for answer in answers]

    def save_adapter(self, folder: str | Path) -> None:
        """Write the LoRA as peft does: adapter_config.json, which names the language model, and its weights.

        Raises:
            ValueError: a decoder without LoRA.
        """
        # Asked to judge for itself whether embeddings are trained, peft would ask the hub.
        self._peft("save").save_pretrained(str(folder), save_embedding_layers=False)

    def load_adapter(self, folder: str | Path) -> None:
        """Take over the LoRA that `save_adapter` or peft wrote; it is trained on from there.

        Raises:
            WeightsNotFound: no adapter there.
            ValueError: a decoder without LoRA, or an adapter of another shape than its own.
        """
        model = self._peft("load one into")
        files = [Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        for file in files:
            if not file.is_file():
                raise WeightsNotFound(f"There is no {file}: give a folder that save_adapter has written")
        mine, found = model.peft_config[ADAPTER], PeftConfig.from_pretrained(str(folder))
        for key in ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"):
            if (theirs := getattr(found, key, None)) != (own := getattr(mine, key)):
                raise ValueError(
                    f"The adapter in {folder} has {key}={theirs}, this decoder {own}: give the decoder's lora the "
                    "adapter's values"
                )
        weights = load_file(files[1])
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
            raise ValueError(
                f"The adapter in {folder} was trained on {found.base_model_name_or_path}; its weights do not fit "
                f"{mine.base_model_name_or_path}"
            )
        set_peft_model_state_dict(model, weights, ADAPTER)

    def merged(self) -> PreTrainedModel:
        """A plain language model in fp32 with the LoRA added to its weights, to be saved and loaded without peft.

        The weights of a quantised model are those that the LoRA was trained on top of, so what was rounded off in
        loading is not restored, and the merged model says what the decoder says.

        Raises:
            ValueError: a decoder without LoRA.
        """
        self._peft("merge")
        model = self.language_model
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in plain.state_dict().items():
                tensor.copy_(_merged_tensor(model, name))
        plain.generation_config = copy.deepcopy(model.generation_config)
        return plain.eval()

    def _peft(self, act: str) -> PeftModel:
        if not isinstance(self.backbone, PeftModel):
            raise ValueError(f"this decoder has no LoRA to {act}: build it with from_pretrained and lora")
        return self.backbone

    def _sequence(self, prefix: Tokens, text: Dialogue) -> tuple[Tensor, Tensor]:
        """The vectors `[batch, prefix + tokens, width]` of prefix and text, zero where nothing real is; their mask."""
        if prefix.tokens.shape[2] != self.width:
            raise ValueError(f"the prefix is {prefix.tokens.shape[2]} wide; this decoder reads {self.width}")
        words = self.language_model.get_input_embeddings()(text.ids)
        real = torch.cat([prefix.mask, text.real], dim=1)
        sequence = torch.cat([prefix.tokens.to(words.dtype), words], dim=1)
        return sequence.masked_fill(~real[..., None], 0), real  # a NaN there would spread: 0 * NaN is NaN

    def _generation(self, sampling: Sampling) -> GenerationConfig:
        options: dict[str, Any] = {}
        if sampling.temperature:
            options = {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or 0,
                "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            }
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(options),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **options,
        )


def _without_peft(backbone: PreTrainedModel | PeftModel) -> Any:
    return backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone


@contextmanager
def _no_warnings_of_new_names() -> Iterator[None]:
    """Gradient checkpointing has another name since transformers 5.24, which peft and older ones do not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class _Says(StoppingCriteria):
    """Ends each answer that holds one of the strings.

    transformers' own criterion first compares every string with every token of the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: list[str]):
        self.tokenizer = tokenizer
        self.strings = strings

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """`[batch]` bool; `input_ids` are the new tokens only, since the prompt came as vectors."""
        answers = self.tokenizer.batch_decode(input_ids)
        found = [any(string in answer for string in self.strings) for answer in answers]
        return torch.tensor(found, device=input_ids.device)


def _before(answer: str, strings: list[str]) -> str:
    """The answer up to the first of the strings."""
    return answer[: min((answer.index(string) for string in strings if string in answer), default=None)]


def _real_before(real: Tensor) -> Tensor:
    """The place of the last real token before each token of `real` `[batch, tokens]`; -1 where there is none."""
    places = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, places, -1).cummax(1).values
    return torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)


def _check_choices(load_in_8bit: bool, load_in_4bit: bool, attention: str, dtype: str) -> None:
    if load_in_8bit and load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit are both true: a model is kept in one of them")
    if (load_in_8bit or load_in_4bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_8bit and load_in_4bit need the package bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or leave both false"
        )
    if attention not in (known := ["sdpa", "flash_attention_2", "eager"]):
        raise ValueError(f"attention={attention!r}: give one of {known}")
    if attention == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                "attention=flash_attention_2 needs the package flash_attn, which is not installed: pip install "
                "flash-attn, or give attention=sdpa"
            )
        if not torch.cuda.is_available():
            raise ValueError("attention=flash_attention_2 needs a GPU, and there is none: give attention=sdpa")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r}: give one of {['auto', *DTYPES]}")


def _quantisation(load_in_8bit: bool, load_in_4bit: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if load_in_8bit:
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_more_than_a_cast)
        return BitsAndBytesConfig(load_in_8bit=True)
    if load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


def _is_more_than_a_cast(record: logging.LogRecord) -> bool:
    """Every int8 multiplication of fp32 or bf16 warns that it rounds to fp16, as is its way."""
    return "inputs will be cast" not in str(record.msg)


def _lora_config(model: PreTrainedModel, lora: dict, name: str) -> LoraConfig:
    """peft's config, for layers that the model has.

    Raises:
        ValueError: keys other than `LORA`, or a target that is no linear layer of the model.
    """
    if lora.keys() != set(LORA):
        raise ValueError(f"lora has {sorted(lora)}: give it {', '.join(LORA)}, or null for no LoRA")
    targets = lora["target_modules"]
    if targets != "all-linear":
        head = model.get_output_embeddings()
        layers = [
            path for path, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
        ]
        targets = [targets] if isinstance(targets, str) else list(targets)
        unknown = [target for target in targets if not any(f".{path}".endswith(f".{target}") for path in layers)]
        if unknown or not targets:
            there = sorted({path.rpartition(".")[2] for path in layers})
            raise ValueError(
                f"lora.target_modules={targets}: {type(model).__name__} has no linear layers "
                f"{', '.join(map(repr, unknown)) or 'of no name'}; it has {', '.join(there)}, or give all-linear"
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=targets,
    )


def _merged_tensor(model: PreTrainedModel, name: str) -> Tensor:
    """What a plain model would call `name`, out of its quantisation and with the LoRA added."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    tensor = getattr(layer, leaf)
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        tensor = dequantize_bnb_weight(tensor, getattr(layer, "state", None))
    if isinstance(module, LoraLayer) and leaf == "weight":
        tensor = tensor.float() + module.get_delta_weight(ADAPTER)  # type: ignore[attr-defined, operator]
    return tensor
