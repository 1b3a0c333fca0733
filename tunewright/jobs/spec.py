"""What the server tells a trainer and what a trainer tells the server: two files in the job's work folder.

    jobs/{job_id}/
      spec.json             TrainingSpec, written by the server before each attempt (atomic)
      attempt               the number of the newest attempt: a trainer with a lower one must stop (fencing)
      trainer.json          TrainerProcess, written by the trainer once it holds `lock`
      lock                  flock held by the trainer for its whole life: never two trainers for one job
      heartbeat             touched every second by the trainer
      journal-{attempt}.jsonl   one JournalRecord per line, appended and flushed; a line without newline is not there yet
      log-{attempt}.txt     stdout and stderr
      data/train.jsonl ...  the rows, as the server put them
      data/skip.json        RowChoice, if some rows are not used
      checkpoints/step-{n}/ published by one rename, with MANIFEST.json (sha256 of each file)
      tensorboard/          an event file of each attempt, if the job wants them
      result/               the adapter in PEFT's format, or of training type full a whole model with MANIFEST.json; published
                            by one rename before the `finished` record

      rehearsal/            work folder of the dress rehearsal: the same files again, but for the data; `rehearsed` takes the
                            place of `finished`

A trainer never opens the database. SIGTERM asks it to stop at the next step: it then saves a checkpoint and writes `stopped`.
"""

from typing import Any

import msgspec

COMPUTING = "computing.json"
"""In a work folder: how a training is computed. The training takes over what its rehearsal chose, whose memory was measured."""
RECEIPTS = "receipts.jsonl"
"""In the work folder once training is done, if the job has any: a jobs/receipts.py RowReceipt on each line."""
TENSORBOARD = "tensorboard"
"""In the work folder, if the job wants it: what TensorBoard takes as a log directory."""


class EarlyStopping(msgspec.Struct, frozen=True, kw_only=True):
    """Training ends when in `patience` evaluations in a row the validation loss did not fall by more than `min_delta`."""

    patience: int = 3
    min_delta: float = 0.0


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """Resolved numbers. `batch_size` counts rows per optimizer step.

    The last three say how it is computed, not what; where they are open ('auto', None) the trainer measures and chooses.
    """

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    lora_rank: int = 16
    lora_alpha: int = 32
    max_length: int = 1024
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    beta: float | None = None
    eval_steps: int | None = None
    """The validation rows are looked at every so many steps, besides the end of each epoch. None: only there."""
    early_stopping: EarlyStopping | None = None
    precision: str = "auto"
    """auto, float32 or bfloat16: of the base; what is trained is float32 in any case."""
    activation_checkpointing: str = "auto"
    """auto, on or off."""
    micro_batch_tokens: int | None = None
    """Tokens of one forward pass."""


class DataChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What of one data file is used: `rows` good ones. `skip` are the lines to pass over, ascending, counted from 1."""

    sha256: str
    size_bytes: int
    rows: int
    skip: tuple[int, ...] = ()


class RowChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What is used of the files of a job."""

    train: DataChoice
    validation: DataChoice | None = None


class TrainingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a trainer needs. Paths are absolute."""

    job_id: str
    attempt: int
    work_folder: str
    base_code: str
    base_path: str
    base_files: dict[str, str]
    """File name -> sha256; the trainer refuses weights that differ."""
    start_adapter_path: str | None = None
    start_adapter_sha256: str | None = None
    method: str = "supervised"
    training_type: str = "lora"
    training_data: str
    training_sha256: str
    validation_data: str | None = None
    validation_sha256: str | None = None
    skip_lines: str | None = None
    """The file `data/skip.json`; None if every row is used."""
    hyperparameters: Hyperparameters
    seed: int
    threads: int
    """0 lets the trainer measure how many are best."""
    products: str = "auto"
    """Whose matrix products: `torch` or `numpy`; `auto` lets the trainer measure which are faster."""
    memory_limit_bytes: int = 0
    """What the trainer may take in all; 0 lets it look at what is free."""
    checkpoint_every_s: float
    halve_micro_batch: bool = False
    """Memory ran out before: take half of what would be chosen for one forward pass, from the first step on."""
    on_corrupt: str = "fail"
    """Where checkpoints lie there and none is whole: `fail` with `checkpoint_unrecoverable`, or `restart` from step 0."""
    max_line_bytes: int
    receipts: str = "off"
    """auto (as many rows as take little time), on (every row) or off."""
    tensorboard: bool = False
    """Write event files for TensorBoard."""
    token_cache: str | None = None
    """Folder of the tokenised data files (datasets/tokens/packed_cache.py); None keeps none."""
    token_cache_bytes: int = 0
    rehearsal: bool = False
    """Only try the training out: two steps, a checkpoint, an answer, and what that tells of the rest."""


class TrainerProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of a live trainer that survives a restart of the server: pid alone can be reused, pid + start time cannot."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/{pid}/stat."""
    attempt: int


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The first record of an attempt. `resumed_step` is 0 for a fresh start."""

    total_steps: int
    resumed_step: int
    rows: dict[str, int]
    """used, skipped (bad rows, and rows with nothing to train on), cut; of the validation rows those used: validation."""
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    choices: dict[str, Any]
    """What was chosen at start and why: dtype, threads, parameters trained ..."""
    renderer_hash: str


class Metrics(msgspec.Struct, frozen=True, kw_only=True, tag="metrics"):
    """One optimizer step. `tokens` counts tokens processed since step 0 (prompt tokens included)."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    accuracy: float | None
    learning_rate: float
    tokens: int
    elapsed_s: float
    remaining_s: float | None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    reward_margin: float | None = None
    """Of preference training: by how much the preferred answers gained more than the others, times beta, on average. There
    `accuracy` is the share of pairs in which they did."""
    eval_reward_margin: float | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """A checkpoint is on the disk and verified."""

    step: int
    path: str
    """Relative to the work folder."""
    metrics: dict[str, Any]
    kept: list[int] | None = None
    """The steps of all checkpoints that are there now, this one among them; None: all that there ever were."""
    adapter_sha256: str | None = None
    """Of its adapter's weights; None if it holds a whole model."""
    renderer_hash: str | None = None


class Note(msgspec.Struct, frozen=True, kw_only=True, tag="note"):
    """Something a user should know (a corrupt checkpoint passed over, rows cut). `message` is an English template."""

    level: str
    code: str
    message: str
    values: dict[str, Any] = {}


class ReceiptCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Receipts were written for `rows` of the `of` rows that were trained on."""

    rows: int
    of: int
    never_learned: int
    contradicting: int


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The last record of a success: `result/` is complete."""

    trained_tokens: int
    final_loss: float | None
    adapter_sha256: str
    """Of `result/adapter_model.safetensors`; of a whole model that of `result/MANIFEST.json`, which has those of the rest."""
    step: int | None = None
    """Whose weights they are; None: of the last one."""
    receipts: ReceiptCounts | None = None


class Rehearsed(msgspec.Struct, frozen=True, kw_only=True, tag="rehearsed"):
    """The last record of a dress rehearsal that went well."""

    lines: list[int]
    """Of the training file: where the rows stand that were rehearsed with."""
    memory_peak_bytes: int
    """Of the process (resident set)."""
    gpu_memory_peak_bytes: int | None = None
    micro_batch_tokens: int
    seconds_per_step: float
    """Of a step of the training, on average."""
    least_s: float
    most_s: float
    """Between these is what the whole training will take."""
    tokens: int
    """Of all epochs."""
    answer: str
    """The beginning of what the model, loaded again from the checkpoint, answers to the first rehearsed row."""
    seconds: float
    """What the rehearsal took, its start included."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The last record of a failure that a retry would not mend."""

    code: str
    message: str
    param: str | None = None
    values: dict[str, Any] = {}


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag="stopped"):
    """The last record after SIGTERM: a checkpoint at `step` exists."""

    step: int


JournalRecord = Started | Metrics | Checkpoint | Note | Finished | Rehearsed | Failed | Stopped

encode_record = msgspec.json.Encoder().encode
decode_record = msgspec.json.Decoder(JournalRecord).decode
