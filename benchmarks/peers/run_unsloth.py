"""One run of Unsloth as its notebooks do it, in its own environment: `python run_unsloth.py REQUEST_JSON`."""

# pyright: reportMissingImports=false

import measuring

measuring.quiet()
asked = measuring.request()

# Before all that it patches, or its trainer is plain TRL's.
import unsloth  # noqa: E402, I001
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from unsloth.chat_templates import train_on_responses_only  # noqa: E402

meter = measuring.watch(asked)
settings = dict(asked.settings)
batch = settings.pop("batch", 2)  # as in its notebooks
model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
    asked.base,
    max_seq_length=asked.max_length,
    dtype=getattr(torch, settings.pop("dtype")) if "dtype" in settings else None,
    load_in_4bit=False,
    full_finetuning=asked.method == "full",
)
if asked.method == "lora":
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=settings.pop("checkpointing", "unsloth"),
    )
texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in asked.rows]
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"text": text} for text in texts]),
    args=SFTConfig(
        **measuring.training_arguments(asked),
        max_length=asked.max_length,
        dataset_text_field="text",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=settings.pop("accumulation", asked.rows_per_step // batch),
        **settings,
    ),
)
trainer = train_on_responses_only(
    trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
)
trainer.train()
meter.print_line()
