"""Where a call goes: from the name in a request to the pool or to the least busy replica of a deployment."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.attempts import attempts
from tunewright.deployments.decision import READY
from tunewright.deployments.pool import Pool
from tunewright.deployments.ports import Done, Embed, Generate, State, TokenText, Vector
from tunewright.deployments.reconciler import Reconciler, Running, event_of
from tunewright.deployments.records import FAILED, RETIRED, Deployment
from tunewright.deployments.replicas import Replica
from tunewright.deployments.worker_client import WorkerGone
from tunewright.deployments.workers import Worker, engine_overloaded, states_of, with_adapter
from tunewright.errors import InvalidRequest, NotFound, Unavailable
from tunewright.i18n import mark
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.models.service import ModelService
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
"""What a deployment may be called; ids have this form too."""
_LOOK_EVERY_S = 0.05


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What answers to a name. `deployment` None: the pool of the base."""

    base: Base
    tuned: TunedModel | None
    deployment: Deployment | None


class Serving:
    """`resolve` and `prove` block; `generate` may run on any event loop."""

    def __init__(
        self,
        storage: "Storage",
        models: ModelService,
        pool: Pool,
        reconciler: Reconciler,
        home: HomeFolder,
        settings: Settings,
    ) -> None:
        self._storage = storage
        self._models = models
        self._pool = pool
        self._reconciler = reconciler
        self._home = home
        self._settings = settings

    def resolve(self, project_id: str, name: str) -> Target:
        """A base, an alias, a tuned model or a checkpoint by its name; a deployment by its name or id.

        The model of a deployment goes to it, other LoRA models and bases to the pool. Raises NotFound (`model_not_found`, also
        for what was undeployed), InvalidRequest (`model_not_deployed`, `model_not_pulled`).
        """
        try:
            resolved = self._models.resolve(project_id, name)
        except NotFound:
            deployment = self._deployed(project_id, name)
            if deployment is None:
                raise
            if deployment.phase == RETIRED:
                raise _undeployed(name) from None
            resolved = self._models.resolve(project_id, deployment.model)
            return Target(base=resolved.base, tuned=resolved.tuned, deployment=deployment)
        base, tuned = resolved.base, resolved.tuned
        if tuned is None and base.pool:
            return Target(base=base, tuned=None, deployment=None)
        with self._storage.read() as tx:
            deployment = tx.deployments.serving(project_id, base.code if tuned is None else tuned.name)
        if deployment is None and (not base.pool or (tuned is not None and tuned.kind == FULL)):
            raise InvalidRequest(
                "model_not_deployed",
                mark('"{model}" is not served from the shared pool; deploy it first: POST /api/v1/deployments.'),
                param="model",
                model=name,
            )
        return Target(base=base, tuned=tuned, deployment=deployment)

    def _deployed(self, project_id: str, name: str) -> Deployment | None:
        if not NAME.fullmatch(name):
            return None
        with self._storage.read() as tx:
            return tx.deployments.named(project_id, name) or tx.deployments.get(project_id, name)

    def prove(self, base: Base, model: TunedModel) -> dict[str, Any]:
        """Measure the effect of a model in the pool (see `Pool.prove`)."""
        return self._pool.prove(base, model)

    def generate(self, target: Target, request: Generate) -> AsyncGenerator[TokenText | Done, None]:
        """The answer piece by piece. Raises Unavailable (`engine_lost`, `engine_busy`, `instance_not_ready`, ...), NotFound
        (`model_not_found`) when it was undeployed meanwhile, or what the engine refuses."""
        if target.deployment is None:
            return self._pool.generate(target.base, target.tuned, request)
        adapted = target.tuned is not None and target.tuned.kind != FULL and not target.deployment.merge
        request = with_adapter(request, self._home, target.tuned if adapted else None)
        return self._from_instance(target.deployment, request)

    def check_room(self, target: Target) -> None:
        """Raises Unavailable (`engine_overloaded`) if whatever serves `target` would refuse one more request."""
        if target.deployment is None:
            self._pool.check_room(target.base)
            return
        running = self._reconciler.running(target.deployment.id)
        replica = None if running is None else _least_busy(running)
        if replica is not None and replica.in_flight >= self._settings.engine_slots + self._settings.engine_queue:
            raise engine_overloaded()

    def embed(self, target: Target, request: Embed) -> AsyncGenerator[Vector | Done, None]:
        """Vectors of texts, which the pool makes."""
        return self._pool.embed(target.base, request)

    async def states(self) -> list[State]:
        """What the workers of the pool and of all instances say of themselves now; who does not answer in time is left out."""
        return await self._pool.states() + await states_of(self._reconciler.workers())

    async def _from_instance(self, deployment: Deployment, request: Generate) -> AsyncGenerator[TokenText | Done, None]:
        """A replica that dies before the first piece costs the caller nothing as long as there is another."""
        running = await self._awake(deployment)
        limit_s = None if request.priority else self._settings.first_token_limit_s or None
        place = partial(self._place, deployment, running)
        async with aclosing(attempts(self._reconciler.quarantine, deployment.id, request, limit_s, place)) as replies:
            async for reply in replies:
                yield reply

    @asynccontextmanager
    async def _place(self, deployment: Deployment, running: Running) -> AsyncIterator[Worker]:
        replica = _least_busy(running)
        if replica is None or replica.worker is None:
            raise self._not_ready(running)
        replica.in_flight += 1
        running.called_s = mono_s()
        try:
            yield replica.worker
        except WorkerGone:
            replica.suspect()
            self._reconciler.wake()
            if running.retired:
                raise _undeployed(deployment.name) from None
            raise
        finally:
            replica.in_flight -= 1
            running.called_s = mono_s()

    async def _awake(self, deployment: Deployment) -> Running:
        """What is known of it; one that sleeps is woken and waited for."""
        running = await self._known(deployment)
        if running is None or running.retired:
            raise self._not_ready(None)
        if not (deployment.asleep or running.deployment.asleep):
            return running
        running.called_s = mono_s()
        await asyncio.to_thread(self._wake, deployment)
        deadline_s = mono_s() + self._settings.engine_start_limit_s
        while _least_busy(running) is None and mono_s() < deadline_s:
            if running.retired:
                raise _undeployed(deployment.name)
            reason = running.deployment.reason
            if running.deployment.status == FAILED or (reason and reason.code == "insufficient_memory"):
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        return running

    async def _known(self, deployment: Deployment) -> Running | None:
        """Another server may have started a replica just now, of which the row tells already."""
        running = self._reconciler.running(deployment.id)
        told = any(record.state == READY for record in deployment.replica_records)
        if told and (running is None or (_least_busy(running) is None and not self._reconciler.leads)):
            await self._reconciler.look_again()
            running = self._reconciler.running(deployment.id)
        return running

    def _wake(self, deployment: Deployment) -> None:
        with self._storage.write() as tx:
            now = tx.deployments.get(deployment.project_id, deployment.id)
            if now is None or not now.asleep:
                return
            now = tx.deployments.change(now, asleep=False, status="scaling")
            if now is not None:
                tx.deployments.add_event(event_of(now, "woken", mark("A call came; it starts again.")))
        if now is not None:
            self._reconciler.expect(now)

    def _not_ready(self, running: Running | None) -> Unavailable:
        reason = None if running is None else running.deployment.reason
        if reason is not None and reason.code == "insufficient_memory":
            return Unavailable(reason.code, reason.message, **reason.values)
        return Unavailable("instance_not_ready", mark("No replica takes calls now; try again in a moment."))


def _least_busy(running: Running) -> Replica | None:
    ready = [replica for replica in list(running.replicas) if replica.takes_calls()]
    return min(ready, key=lambda replica: replica.in_flight, default=None)


def _undeployed(name: str) -> NotFound:
    return NotFound(
        "model_not_found",
        mark('"{model}" was undeployed and can\'t be called any more.'),
        param="model",
        model=name,
    )
