"""Where the parts are chosen and joined. Nothing else names an adapter (`storage`, `runners`, `engines`)."""

import threading

import structlog

from tunewright.accounts.service import AccountService
from tunewright.accounts.usage import UsageLedger, UsageService
from tunewright.batches.controller import BatchController
from tunewright.batches.ports import Speech
from tunewright.batches.service import AsyncTaskService, BatchService
from tunewright.clock import mono_s
from tunewright.completions.metering import Metering
from tunewright.completions.metrics import ServingMetrics
from tunewright.completions.service import CompletionService
from tunewright.datasets.parted_uploads import PartedUploads
from tunewright.datasets.service import DatasetService
from tunewright.datasets.tokens.token_service import TokenService
from tunewright.deployments.pool import Pool
from tunewright.deployments.reconciler import Reconciler
from tunewright.deployments.service import DeploymentService
from tunewright.deployments.serving import Serving
from tunewright.egress import Egress
from tunewright.errors import TunewrightError, Unavailable
from tunewright.jobs.controller import JobController
from tunewright.jobs.lease import Lease, holder_of
from tunewright.jobs.line import Line
from tunewright.jobs.service import JobService
from tunewright.models.catalogue import Catalogue
from tunewright.models.file_lock import ReentrantLock
from tunewright.models.service import ModelService
from tunewright.notifications.apprise_sender import AppriseSender
from tunewright.notifications.deliverer import Deliverer
from tunewright.notifications.outbox import record_end
from tunewright.notifications.sealing import Vault
from tunewright.notifications.sending import Sending
from tunewright.notifications.service import NotificationService
from tunewright.notifications.webhooks import WebhookSender
from tunewright.runners.local import LocalRunner
from tunewright.runners.machine import LocalMachine
from tunewright.servers import Servers
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Blobs, Storage

log = structlog.get_logger()


class Platform:
    """One running product: every service, and the control loop that moves jobs.

    `prepare()` is enough for the command line; `start()` makes it a server of its home and `stop()` ends it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.home = HomeFolder(settings.home)
        self.home.create()
        self.storage = Storage(settings.database_url or f"sqlite:///{self.home.database}")
        self.servers = Servers(self.storage, self.home, settings.database_url)
        self.blobs = Blobs(settings.blob_url or f"file://{self.home.blobs}")
        self.accounts = AccountService(self.storage, self.home, settings)
        self.datasets = DatasetService(self.storage, self.blobs, self.home, settings)
        self.uploads = PartedUploads(self.storage, self.datasets, self.home, settings)
        self.tokens = TokenService(self.blobs, self.home, settings)
        self.datasets.on_delete = self.tokens.forget
        self._images_lease = Lease(self.storage, "images", lambda: holder_of(self.home))
        self.datasets.images.acts = self._images_lease.held
        if self.servers.shared:
            self.datasets.images.blobs_lock = ReentrantLock(self.home.temporary / "images.lock")
        self.catalogue = Catalogue(self.home)
        self.models = ModelService(self.storage, self.catalogue, self.home)
        line = Line(settings, LocalMachine())
        self.jobs = JobService(self.storage, self.catalogue, self.models, self.home, settings, line)
        runner = LocalRunner()
        self.pool = Pool(self.home, settings, runner, shared=self.servers.shared)
        self.controller = JobController(
            self.storage,
            self.blobs,
            self.catalogue,
            self.models,
            self.home,
            settings,
            runner,
            self.pool,
            line,
            on_end=record_end,
        )
        self.jobs.on_end = record_end
        self.jobs.on_change = self.controller.wake
        self.models.on_delete = self.pool.forget
        self.instances = Reconciler(
            self.storage,
            self.models,
            self.home,
            settings,
            runner,
            line,
            self.pool.memory_bytes,
            shared=self.servers.shared,
        )
        line.instances_bytes = self.instances.promised_bytes
        self.models.on_undeploy = self.instances.retire
        self.deployments = DeploymentService(
            self.storage, self.models, self.catalogue, self.instances, self.home, settings
        )
        self.serving = Serving(self.storage, self.models, self.pool, self.instances, self.home, settings)
        self.ledger = UsageLedger(self.storage, "", settings.usage_kept_days)
        self.usage = UsageService(self.storage)
        self.metrics = ServingMetrics(self.ledger, settings.metrics_adapters)
        self.metering = Metering(self.ledger, self.metrics)
        self.completions = CompletionService(self.models, self.serving, settings, self.metering)
        self.speeches: dict[tuple[str, str], Speech] = {}
        """(dialect, kind) -> how such requests are read and answered while nobody waits; the dialects put theirs here."""
        self.batches = BatchService(self.storage, settings)
        self.async_tasks = AsyncTaskService(self.storage, settings, self.speeches)
        self.batch_controller = BatchController(self.storage, self.datasets, self.home, settings, self.speeches)
        self.batches.on_change = self.async_tasks.on_change = self.batch_controller.wake
        vault = Vault(self.accounts)
        self.sending = Sending(
            self.storage, vault, WebhookSender(Egress()), AppriseSender(), settings.max_messages_per_day
        )
        self.notifications = NotificationService(self.storage, vault, self.sending)
        self.deliverer = Deliverer(self.storage, self.sending)
        self.stopping = threading.Event()
        """Set when the server begins to drain: readiness fails, event streams end."""
        self.refusing_until_s: float | None = None
        """Newcomers are sent away from now until this monotonic second, when the server ends; None: they are served."""
        self.first_key: str | None = None
        """The key made at the very first start, to be shown once."""
        self._started = False
        self._checked: tuple[float, list[str]] = (float("-inf"), [])

    def prepare(self) -> None:
        """Schema at head, first project and key. Raises Misconfigured for a home that this release can't use."""
        self.storage.migrate()
        self.first_key = self.accounts.first_start()

    def start(self) -> None:
        """Become a server of this home: recover what an earlier one left, then run the control loops.

        Does nothing the second time. Raises Misconfigured (`home_in_use`, a database of another release, ...).
        """
        if self._started:
            return
        with self.servers.joining() as alone:
            self.prepare()
            self.servers.claim_database()
            if alone:  # what lies about is nobody's
                self.datasets.sweep()
                self.tokens.sweep()
                self.uploads.sweep()
                self.jobs.sweep()
                self.models.sweep()
            self.ledger.server = holder_of(self.home)
            self.ledger.start(self.servers.dead())
        self.pool.start()
        self.instances.start()
        self.datasets.images.start()
        self.controller.start()
        self.deliverer.start()
        self.batch_controller.start()
        self._started = True
        log.info("started", home=str(self.home.root))

    def stop(self) -> None:
        """End the control loops and the engines; trainers as `settings.on_shutdown` says. What runs is left to other servers of
        the home, if there are any. Safe to call twice."""
        self.stopping.set()
        others_stay = self.servers.leave()
        self.controller.stop(others_stay=others_stay)
        self.deliverer.stop()
        self.batch_controller.stop()
        self.tokens.stop()
        self.datasets.images.stop()
        self._release_images()
        if self.servers.joined:  # only who holds the home may end what runs in it
            self.instances.stop(others_stay=others_stay)
            self.pool.stop(others_stay=others_stay)
        self.ledger.stop()
        self.servers.close()
        self.storage.close()

    def _release_images(self) -> None:
        try:
            self._images_lease.release()
        except TunewrightError as error:
            log.warning("images_lease_kept", code=error.code)

    def not_ready(self) -> list[str]:
        """Names of the checks that fail now; empty means ready. Looked at afresh at most once a second."""
        if self.stopping.is_set():
            return ["draining"]
        if not self._started:
            return ["starting"]
        checked_at, failed = self._checked
        if mono_s() - checked_at >= 1.0:
            failed = self._check()
            self._checked = (mono_s(), failed)
        return failed

    def _check(self) -> list[str]:
        failed = []
        try:
            self.storage.probe()
        except TunewrightError:
            failed.append("database")
        try:
            self.datasets.check_room(0)
        except (TunewrightError, Unavailable):
            failed.append("disk")
        return failed


def build(settings: Settings) -> Platform:
    """The product as `settings` want it; nothing is started yet. Raises Misconfigured."""
    return Platform(settings)
