"""One run of LLaMA-Factory, in its own environment: `python run_llamafactory.py REQUEST_JSON`."""

# pyright: reportMissingImports=false

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import measuring

measuring.quiet()
asked = measuring.request()

# It imports torchaudio at once and uses it for audio only; there is no build of it for this torch.
sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
from llamafactory.train.tuner import run_exp  # noqa: E402

meter = measuring.watch(asked)
work = Path(asked.work)
rows = {
    "file_name": asked.data,
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
(work / "dataset_info.json").write_text(json.dumps({"rows": rows}), "utf-8")
settings = dict(asked.settings)
batch = settings.pop("batch", asked.rows_per_step)
arguments = {
    **measuring.training_arguments(asked),
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": asked.base,
    "finetuning_type": asked.method,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_target": "all",
    "dataset": "rows",
    "dataset_dir": asked.work,
    "template": "chatml",
    "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "cutoff_len": asked.max_length,
    "per_device_train_batch_size": batch,
    "gradient_accumulation_steps": settings.pop("accumulation", asked.rows_per_step // batch),
    "use_cpu": True,
    **settings,
}
run_exp(arguments)
meter.print_line()
