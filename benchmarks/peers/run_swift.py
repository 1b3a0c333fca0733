"""One run of ms-swift, in its own environment: `python run_swift.py REQUEST_JSON`."""

# pyright: reportMissingImports=false

import os

import measuring

measuring.quiet()
os.environ.update(USE_HF="1", MODELSCOPE_OFFLINE="1")
asked = measuring.request()

from swift import SftArguments, sft_main  # noqa: E402

meter = measuring.watch(asked)
settings = dict(asked.settings)
batch = settings.pop("batch", None)  # its own default is 1
arguments = {
    **measuring.training_arguments(asked),
    "report_to": ["none"],
    "model": asked.base,
    "model_type": "llama",
    "template": "chatml",
    "system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "tuner_type": asked.method,
    "lora_rank": 8,
    "lora_alpha": 16,
    "target_modules": ["all-linear"],
    "dataset": [asked.data],
    "split_dataset_ratio": 0.0,
    "max_length": asked.max_length,
    "gradient_accumulation_steps": settings.pop("accumulation", asked.rows_per_step // (batch or 1)),
    "use_cpu": True,
    "load_from_cache_file": False,
    **({"per_device_train_batch_size": batch} if batch else {}),
    **settings,
}
sft_main(SftArguments(**arguments))
meter.print_line()
