"""One run of TRL's SFTTrainer, in TRL's own environment: `python run_trl.py REQUEST_JSON`."""

# pyright: reportMissingImports=false

from pathlib import Path

import measuring

measuring.quiet()
asked = measuring.request()

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

meter = measuring.watch(asked)
settings = dict(asked.settings)
dtype = settings.pop("dtype", None)
batch = settings.pop("batch", asked.rows_per_step)
tokenizer = AutoTokenizer.from_pretrained(asked.base)
tokenizer.chat_template = (Path(__file__).parent / "chatml_with_labels.jinja").read_text("utf-8")
config = SFTConfig(
    **measuring.training_arguments(asked),
    use_cpu=True,
    max_length=asked.max_length,
    assistant_only_loss=True,
    per_device_train_batch_size=batch,
    gradient_accumulation_steps=settings.pop("accumulation", asked.rows_per_step // batch),
    model_init_kwargs={"dtype": dtype} if dtype else None,
    **settings,
)
trainer = SFTTrainer(
    model=asked.base,
    args=config,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(asked.rows),
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    if asked.method == "lora"
    else None,
)
trainer.train()
meter.print_line()
