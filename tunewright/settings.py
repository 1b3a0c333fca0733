"""Every setting, from `TUNEWRIGHT_*` environment variables or the command line. The only reader of the environment."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from tunewright.errors import Misconfigured
from tunewright.i18n import mark


class Settings(BaseSettings):
    """Operator settings; units are in the names. `docs/operations.md` lists them all (a test compares)."""

    model_config = SettingsConfigDict(env_prefix="TUNEWRIGHT_", extra="ignore", frozen=True)

    home: Path = Field(default=Path("~/.tunewright"), description="Folder that holds everything; mode 0700")
    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty means SQLite in the home folder")
    blob_url: str = Field(default="", description="obstore URL for uploaded files; empty means the home folder")
    language: Literal["en", "zh"] = Field(default="en", description="Language of messages when a request names none")
    allowed_hosts: list[str] = Field(
        default=["localhost", "127.0.0.1", "[::1]"],
        description="Host headers answered while the address is loopback; '*' answers all",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged")

    max_file_bytes: int = Field(default=512 * 2**20, description="Largest file uploaded in one request")
    max_upload_bytes: int = Field(default=16 * 2**30, ge=1, description="Largest file uploaded in parts")
    max_part_bytes: int = Field(default=64 * 2**20, ge=1, description="Largest part of an upload")
    max_upload_parts: int = Field(default=10_000, ge=1, description="Parts that one upload may have")
    max_open_uploads: int = Field(default=100, ge=1, description="Uploads in parts that one project may have open")
    upload_expiry_s: int = Field(default=24 * 3600, ge=1, description="An upload in parts is dropped after this")
    max_json_bytes: int = Field(default=2**20, description="Largest JSON body outside chat")
    max_chat_bytes: int = Field(default=20 * 2**20, description="Largest chat body")
    max_line_bytes: int = Field(default=4 * 2**20, description="Longest line of a data file")
    remote_media: Literal["public", "off"] = Field(
        default="public", description="Images of data rows: fetched from public addresses, or taken only as base64"
    )
    remote_media_hosts: list[str] = Field(
        default=[], description="The only hosts that images are fetched from, '*.example.com' for all below; empty: any"
    )
    max_images_per_file: int = Field(default=100_000, ge=1, description="Images that the rows of one file may refer to")
    max_image_bytes_per_file: int = Field(default=20 * 2**30, ge=1, description="Bytes of all images of one file")
    min_training_rows: int = Field(default=1, ge=1, description="Fewest rows a training file may have")
    min_free_disk_bytes: int = Field(default=2**30, description="Uploads are refused below this much free disk")

    max_running_jobs: int = Field(default=1, ge=1, description="Trainers at work at the same time")
    memory_bytes: int = Field(
        default=0, ge=0, description="Memory for everything together; 0 means that of the machine or container"
    )
    reserved_memory_bytes: int = Field(
        default=2**30, ge=0, description="What of it trainers and engines leave to the server and the system"
    )
    max_queued_jobs: int = Field(default=100, ge=1, description="Jobs of one project waiting at the same time")
    trainer_threads: int = Field(default=0, ge=0, description="Threads of a trainer; 0 measures at start")
    trainer_products: Literal["auto", "torch", "numpy"] = Field(
        default="auto",
        description="Whose float32 matrix products a trainer of one thread takes; auto measures at start",
    )
    price_per_million_tokens: float | None = Field(
        default=None, ge=0, description="What a million trained tokens cost, for estimates; empty: no price is shown"
    )
    rehearsal: Literal["auto", "always", "off"] = Field(
        default="auto", description="Dress rehearsals of jobs that do not say: auto leaves out those of small jobs"
    )
    token_cache_bytes: int = Field(
        default=10 * 2**30, ge=0, description="Tokenised data files kept in the home; 0 keeps none"
    )
    checkpoint_every_s: float = Field(default=60.0, gt=0, description="Longest stretch of work a crash can cost")
    heartbeat_limit_s: float = Field(default=30.0, gt=0, description="A trainer silent for this long is killed")
    cancel_grace_s: float = Field(default=10.0, gt=0, description="From the polite to the hard end of a trainer")
    max_attempts: int = Field(default=3, ge=1, description="Trainer deaths without progress before a job fails")
    on_corrupt: Literal["fail", "restart"] = Field(
        default="fail", description="What a job does whose checkpoints are all damaged: fail, or restart from step 0"
    )
    on_shutdown: Literal["checkpoint", "continue"] = Field(
        default="checkpoint", description="What SIGTERM of the server does to running trainers"
    )

    engine: Literal["torch", "vllm"] = Field(
        default="torch", description="What answers: our own engine, or vLLM on GPUs (docs/operations.md)"
    )
    vllm_python: Path | None = Field(
        default=None, description="Python of the environment that has vLLM and Tunewright; without it the server's own"
    )
    engine_threads: int = Field(default=0, ge=0, description="Threads of an engine worker; 0 measures at start")
    engine_precision: Literal["auto", "fastest", "float32", "bfloat16"] = Field(
        default="auto", description="Number format of products; auto: float32 on a processor; fastest measures at start"
    )
    engine_weights: Literal["exact", "float16", "int8"] = Field(
        default="exact",
        description="Weights of bases: as they are, or rounded to 16 or 8 bits, which is up to several times as fast",
    )
    engine_slots: int = Field(default=16, ge=1, description="Sequences decoded together by one worker")
    engine_queue: int = Field(default=256, ge=1, description="Requests waiting at one worker before it refuses")
    engine_adapters: int = Field(default=32, ge=1, description="Adapters held in memory by one worker")
    engine_context_tokens: int = Field(default=4096, ge=64, description="Longest prompt plus answer that is served")
    engine_start_limit_s: float = Field(default=600.0, gt=0, description="A worker not ready after this is a failure")
    engine_idle_exit_s: float = Field(default=120.0, gt=0, description="An orphaned idle worker ends itself after this")
    engine_silence_limit_s: float = Field(
        default=8.0, gt=0, description="An engine worker that says nothing for this long is killed"
    )
    engine_step_limit_s: float = Field(
        default=60.0, gt=0, description="An engine worker that stays in one step for this long is killed"
    )
    first_token_limit_s: float = Field(
        default=30.0, ge=0, description="A request whose answer has not begun after this is refused; 0: any"
    )
    max_replicas: int = Field(default=8, ge=1, description="Replicas that one deployment may have")
    replica_drain_s: float = Field(
        default=600.0, ge=0, description="Time that answers of a replica that is not wanted any more get to end"
    )
    max_messages_per_day: int = Field(
        default=200, ge=0, description="Messages of one project in 24 hours through SMS, chat and mail services"
    )
    max_completion_tokens: int = Field(default=1024, ge=1, description="Answer length when a request names none")
    max_requests_per_minute: int = Field(default=600, ge=0, description="Requests of one key in the long run; 0: any")
    request_burst: int = Field(default=60, ge=1, description="Requests that one key may send at once")
    max_tokens_per_minute: int = Field(
        default=0, ge=0, description="Tokens of one key in the long run, prompts and answers together; 0: any"
    )
    max_refused_keys_per_minute: int = Field(
        default=20, ge=0, description="Requests without a valid key that one address may send; 0: any"
    )
    max_streams_per_key: int = Field(default=50, ge=1, description="Completions one key may have under way")
    max_batch_requests: int = Field(default=50_000, ge=1, description="Requests that one batch may have")
    max_batch_bytes: int = Field(default=100 * 10**6, ge=1, description="Largest file of a batch")
    max_open_batches: int = Field(default=100, ge=1, description="Batches of one project that have not ended")
    batch_concurrency: int = Field(
        default=0,
        ge=0,
        description="Requests of batches asked at the same time; 0 means as many as an engine has slots",
    )
    max_async_requests: int = Field(
        default=1000, ge=1, description="Asynchronous requests of one project without an answer yet"
    )
    async_kept_s: int = Field(default=24 * 3600, ge=1, description="How long answers of asynchronous requests are kept")
    metrics_token: SecretStr = Field(
        default=SecretStr(""), description="What Prometheus sends as bearer token to read /metrics; empty: nobody may"
    )
    metrics_adapters: int = Field(default=100, ge=0, description="Adapters with metrics of their own; others are one")
    usage_kept_days: int = Field(default=400, ge=1, description="How long rows about single requests are kept")
    drain_delay_s: float = Field(default=0.0, ge=0, description="Time between 'not ready' and closing on SIGTERM")
    drain_grace_s: float = Field(default=10.0, ge=0, description="Time that open streams get to end on SIGTERM")


def inherited_listener() -> int | None:
    """The descriptor of a listening socket that a service manager hands over (systemd's protocol), None if there is none."""
    handed_over = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    return 3 if handed_over else None


class HomeFolder:
    """Paths inside the home. `create()` makes what is missing, with mode 0700 for the home itself."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.database = self.root / "tunewright.db"
        self.master_key = self.root / "master.key"
        self.first_key = self.root / "first.key"
        self.server_lock = self.root / "server.lock"
        self.catalogue = self.root / "catalogue.toml"
        self.blobs = self.root / "blobs"
        self.bases = self.root / "models"
        self.adapters = self.root / "adapters"
        self.jobs = self.root / "jobs"
        self.workers = self.root / "workers"
        self.temporary = self.root / "tmp"
        self.token_cache = self.root / "cache" / "tokens"
        self.references = self.root / "cache" / "references"
        self.uploads = self.root / "uploads"
        self.batches = self.root / "batches"
        self.server = 1
        """The number of this server among those of the home."""

    def create(self) -> None:
        """Create the folders that are missing; existing ones keep what they hold. Raises Misconfigured (`home_unusable`)."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folders = (self.blobs, self.bases, self.adapters, self.jobs, self.workers, self.temporary, self.uploads)
            for folder in (*folders, self.batches):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Misconfigured(
                "home_unusable",
                mark("The folder {path} can't be used: {reason}"),
                path=self.root,
                reason=error.strerror or "?",
            ) from error
