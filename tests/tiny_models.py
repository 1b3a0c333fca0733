"""Tiny random model folders in Hugging Face layout for the tests of renderer, trainer, engine and API."""

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = [
    "You are a helpful assistant. The user asks a question and the assistant answers it in a few words.",
    "What is the capital of France? The capital of France is Paris. Thank you, that is what I wanted to know.",
    "Please write a short poem about the sea, the sky and the stars. A model is trained on a dataset.",
    'A call of a tool: {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
    "system user assistant tool hello world yes no one two three four five six seven eight nine ten",
    "你好，我是一个人工智能助手。请问有什么可以帮助你的吗？今天天气怎么样？",
    "中国的首都是北京。请用中文回答我的问题，谢谢。模型在数据集上训练，然后部署。",
    "我们正在测试一个很小的模型，它只有两层，所以回答没有意义。",
]


def tiny_tokenizer(folder: Path, *, vocabulary: int = 600, chat_template: str | None = CHATML) -> Path:
    """Write only the tokenizer files of a tiny model: byte-level BPE of at most `vocabulary` tokens. Needs no torch."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}), "utf-8"
    )
    return folder


def tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    vocabulary: int = 600,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = True,
    context: int = 2048,
    chat_template: str | None = CHATML,
) -> Path:
    """Write a random Llama (4 heads, 2 key-value heads) with tokenizer and ChatML template; returns `folder`.

    The same arguments give the same bytes. Ids: 0 `<|endoftext|>`, 1 `<|im_start|>`, 2 `<|im_end|>`; stop ids 2 and 0.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(folder, vocabulary=vocabulary, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            # Wider than the usual 0.02, else all logits are nearly equal and greedy answers depend on rounding.
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    generation = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(generation)  # save_pretrained writes its own, with one stop id
    return folder
