"""TRL's loss at every step on given batches, in TRL's environment: `python record_trl_curve.py FOLDER BASE_FOLDER`.

FOLDER holds what `trl_curve.py` wrote: `batches.json` (tokens and labels of every row in the order of training, rates of every
step) and the initial adapter. Writes `trl_losses.json` there. Everything is float32, on one thread.
"""

# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import measuring

measuring.quiet()

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import PeftModel  # noqa: E402

torch.set_num_threads(1)
folder, base = Path(sys.argv[1]), sys.argv[2]
given = json.loads((folder / "batches.json").read_text("utf-8"))
rates = given["rates"]
asked = measuring.Request(base, "", str(folder), 1, len(rates), 0, "lora", {})
meter = measuring.watch(asked)
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
trainer = trl.SFTTrainer(
    model=model,
    args=trl.SFTConfig(
        output_dir=str(folder / "out"),
        max_steps=len(rates),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=given["rows_per_step"],
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    processing_class=transformers.AutoTokenizer.from_pretrained(base),
    train_dataset=Dataset.from_list(given["rows"]),
    optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])),
)
trainer.train()
versions = {
    "trl": trl.__version__,
    "transformers": transformers.__version__,
    "torch": torch.__version__.partition("+")[0],
}
(folder / "trl_losses.json").write_text(json.dumps({"versions": versions, "losses": meter.losses}), "utf-8")
