"""One file out of a form into the datasets: what `/files` of both dialects and `/api/v1/datasets` share."""

from collections.abc import Callable, Collection, Mapping

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from tunewright.accounts.idempotency import IdempotencyKey
from tunewright.api.access import ClientGone
from tunewright.api.multipart import boundary_of, read_form
from tunewright.api.refusals import refuse_others
from tunewright.api.streaming import unless_gone
from tunewright.api.threads import stoppable
from tunewright.datasets.records import PURPOSES, File
from tunewright.datasets.service import DatasetService
from tunewright.datasets.uploads import REFUSE, Watch
from tunewright.errors import InvalidRequest, as_sent
from tunewright.i18n import mark


async def receive_file(
    request: Request,
    project_id: str,
    datasets: DatasetService,
    idempotency: IdempotencyKey,
    *,
    preset: Mapping[str, str] | None = None,
    only: frozenset[str] | None = None,
    purposes: Collection[str] = PURPOSES,
) -> File:
    """Read the form and keep its file. A client that leaves ends the work, also the check; nothing stays then.

    `preset` are values of fields that the form may leave out; with `only`, other fields than these are refused. Raises
    InvalidRequest(`invalid_purpose`, `unknown_parameter`), what `read_form` and `Upload.finish` raise, and ClientGone.
    """
    boundary_of(request)  # before the disk is touched
    preset = preset or {}
    upload = await run_in_threadpool(datasets.begin_upload, project_id)
    try:
        form = await read_form(request, upload, required=() if "purpose" in preset else ("purpose",))
        if only is not None:
            refuse_others(form.fields, only)
        fields = {**preset, **form.fields}
        if fields["purpose"] not in purposes:
            raise InvalidRequest(
                "invalid_purpose",
                mark("purpose must be one of {purposes}, not {value}."),
                param="purpose",
                purposes=", ".join(purposes),
                value=as_sent(fields["purpose"]),
            )

        def finish(stopped: Callable[[], bool]) -> File:
            return upload.finish(
                form.filename or "",
                fields["purpose"],
                idempotency=idempotency,
                on_problems=fields.get("on_problems") or REFUSE,
                parent_id=fields.get("parent_id") or None,
                watch=watch_of(stopped),
            )

        return await unless_gone(request.receive, stoppable(finish))
    except BaseException:
        upload.abort()  # unlinks a file; quick enough for the loop, and a cancelled task can't wait for a thread
        raise


def watch_of(stopped: Callable[[], bool]) -> Watch:
    """For work that nobody waits for any more: raises ClientGone inside it."""

    def watch(done: int, total: int) -> None:
        if stopped():
            raise ClientGone

    return watch
