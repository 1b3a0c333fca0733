"""The outbox, its loop and its limits, on a clock that the test moves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.webhook_world import NotificationWorld, Receiver, until
from tunewright.clock import wall_s
from tunewright.errors import Conflict, InvalidRequest, NotFound, RateLimited
from tunewright.jobs.records import CANCELLED, FAILED, SUCCEEDED, JobError
from tunewright.notifications import sending
from tunewright.notifications.records import Outcome
from tunewright.notifications.sending import back_off_s
from tunewright.notifications.service import MOST_CHANNELS, NewChannel
from tunewright.notifications.texts import title_and_body

TELEGRAM = "tgram://123456789:abcdefg_hijklmnop/12315544/"


class Services:
    """In place of Apprise: what it was told to send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []
        self.error: str | None = None
        self.recipients = 1

    def check(self, url: str) -> tuple[str, int]:
        return f"{url.partition(':')[0]}://***", self.recipients

    def stop(self) -> None:
        pass

    def send(self, url: str, title: str, body: str) -> Outcome:
        self.sent.append((url, title, body))
        return Outcome(self.error)


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("receiver"))
    yield receiver
    receiver.close()


@pytest.fixture
def world(tmp_path: Path, receiver: Receiver) -> Iterator[NotificationWorld]:
    receiver.got.clear()
    world = NotificationWorld(tmp_path / "home", receiver.egress(), daily_limit=5)
    world.sending.services = Services()  # type: ignore[assignment]
    yield world
    world.close()


def services(world: NotificationWorld) -> Services:
    assert isinstance(world.sending.services, Services)
    return world.sending.services


def test_a_channel_is_told_what_it_asked_for(world: NotificationWorld, receiver: Receiver) -> None:
    world.webhook("/all")
    world.webhook("/failed", events=("fine_tuning.job.failed",))
    off, _ = world.webhook("/off")
    world.service.update(world.project.id, off.id, {"enabled": False})
    world.job(SUCCEEDED)
    world.job(CANCELLED)
    failed = world.job(FAILED)
    world.deliver()
    assert sorted(got.path for got in receiver.got) == ["/all", "/all", "/all", "/failed"]
    of_failed = [got for got in receiver.got if failed.id.encode() in got.body]
    assert len(of_failed) == 2 and len({got.headers["webhook-id"] for got in of_failed}) == 1
    world.deliver()
    assert len(receiver.got) == 4, "once"


def test_backing_off() -> None:
    assert [back_off_s(n) for n in (1, 2, 3, 4, 10, 11, 12, 1000)] == [5, 10, 20, 40, 2560, 3600, 3600, 3600]


def test_a_receiver_that_is_down_for_a_while_misses_nothing(world: NotificationWorld, receiver: Receiver) -> None:
    channel, _ = world.webhook()
    job = world.job()
    receiver.down = True
    tries = 0
    while world.ahead_s < 3600:
        world.deliver()
        [waiting] = world.deliveries(channel)
        assert (waiting.status, waiting.error) == ("pending", "connect")
        assert waiting.next_at - world.now() <= back_off_s(waiting.attempts)
        tries = waiting.attempts
        world.ahead_s += waiting.next_at - world.now()
    receiver.down = False
    world.deliver()
    [done] = world.deliveries(channel)
    assert (done.status, done.error, done.attempts) == ("delivered", None, tries + 1)
    assert tries == 10 and len(receiver.got) == 1 and job.id.encode() in receiver.got[0].body
    assert world.service.get(world.project.id, channel.id).failing_since is None


def test_every_try_has_the_same_id(world: NotificationWorld, receiver: Receiver) -> None:
    channel, _ = world.webhook("/500")
    world.job()
    for _ in range(3):
        world.deliver()
        world.ahead_s += 60
    assert len(receiver.got) == 3
    assert {got.headers["webhook-id"] for got in receiver.got} == {world.deliveries(channel)[0].event_id}
    assert len({got.body for got in receiver.got}) == 1


def test_after_a_day_it_is_given_up_and_after_three_the_channel_is_left_in_peace(
    world: NotificationWorld, receiver: Receiver
) -> None:
    channel, _ = world.webhook("/500")
    world.job()
    while (first := world.deliveries(channel)[-1]).status == "pending":
        world.ahead_s = max(world.ahead_s, first.next_at - wall_s())
        world.deliver()
    assert first.status == "given_up" and 30 < first.attempts < 40
    assert 22 * 3600 < world.ahead_s <= 24 * 3600
    assert world.service.get(world.project.id, channel.id).status == "enabled"
    with world.storage.write() as tx:  # it began to fail long ago
        since = world.service.get(world.project.id, channel.id)
        tx.channels.change(since, failing_since=wall_s() - sending.DISABLED_AFTER_S)
    world.ahead_s = 0
    world.job()
    world.job()
    world.deliver()
    stopped = world.service.get(world.project.id, channel.id)
    assert (stopped.status, stopped.note) == ("disabled", "failing_for_days")
    assert {each.status for each in world.deliveries(channel)} == {"given_up"}
    count = len(receiver.got)
    world.job()
    world.deliver()
    assert len(receiver.got) == count
    again = world.service.update(world.project.id, channel.id, {"enabled": True, "url": "https://good.example/hook"})
    assert (again.status, again.note, again.failing_since) == ("enabled", None, None)
    world.job()
    world.deliver()
    assert receiver.got[-1].path == "/hook"


def test_slow_receivers_delay_nobody_else(tmp_path: Path, receiver: Receiver) -> None:
    """Eight of one project are asked at once; another project's message passes them all."""
    world = NotificationWorld(tmp_path / "home", receiver.egress())
    other = world.accounts.create_project("other")
    receiver.release.clear()
    receiver.waiting = 0
    try:
        for n in range(10):
            world.webhook(f"/slow{n}")
        first, _ = world.service.create(other.id, NewChannel(url="https://good.example/quick"))
        world.job()
        world.deliverer.start()
        until(lambda: receiver.waiting == 8)
        world.job(project=other)
        until(lambda: world.service.deliveries(other.id, first.id, after=None, limit=1)[0][0].status == "delivered")
        assert receiver.waiting == 8, "the slow ones are still waited for"
        receiver.release.set()
        until(lambda: receiver.waiting == 10)
    finally:
        receiver.release.set()
        world.close()
        receiver.release.clear()


def test_people_get_a_sentence_in_their_language_without_data_of_rows(world: NotificationWorld) -> None:
    world.service.create(world.project.id, NewChannel(url=TELEGRAM, language="zh"))
    world.service.create(world.project.id, NewChannel(url="slack://x", language="en"))
    error = JobError(
        code="crashed",
        message="The trainer ended unexpectedly {failures} times in a row, last after step {step}.",
        values={"failures": 3, "step": 7, "log": "row text", "more": {"x": "row text"}},
    )
    job = world.job(FAILED, error=error)
    odd = world.job(
        FAILED, error=JobError(code="wrong_format", message="Row says '{value}' {gone}", values={"value": "x"})
    )
    world.deliver()
    texts = {url.partition(":")[0]: f"{title}\n{body}" for url, title, body in services(world).sent if job.id in body}
    assert texts["tgram"] == (
        f"微调失败：tiny:1::abc\n任务 {job.id} 失败，没有产生模型 tiny:1::abc。"
        "原因（crashed）：训练进程连续 3 次意外结束，最后一次在第 7 步之后。"
    )
    assert "ended unexpectedly 3 times in a row, last after step 7." in texts["slack"]
    others = [body for _, _, body in services(world).sent if odd.id in body]
    assert others and all("wrong_format" in body and "'x'" not in body for body in others)
    assert "row text" not in str(services(world).sent)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("status", [SUCCEEDED, FAILED, CANCELLED])
def test_every_event_has_its_text(world: NotificationWorld, status: str, language: str) -> None:
    channel, _ = world.webhook()
    job = world.job(status)
    title, body = title_and_body(world.deliveries(channel)[0], language)
    assert job.tuned_model_name in title and job.id in body and "{" not in title + body
    assert title.isascii() is (language == "en")


def test_messages_that_may_cost_money_have_a_daily_limit(world: NotificationWorld, receiver: Receiver) -> None:
    services(world).recipients = 2
    paid, _ = world.service.create(world.project.id, NewChannel(url=TELEGRAM))
    free, _ = world.webhook()
    for _ in range(3):
        world.job()
    world.deliver()
    assert len(services(world).sent) == 2, "two of two people each; the third would be over five"
    assert len(receiver.got) == 3, "webhooks are not counted"
    waiting = next(each for each in world.deliveries(paid) if each.status == "pending")
    assert waiting.error == "daily_limit" and waiting.attempts == 0
    with pytest.raises(RateLimited) as caught:
        world.service.test(world.project.id, paid.id)
    assert caught.value.code == "daily_limit"
    assert world.service.test(world.project.id, free.id).status == "delivered"
    world.ahead_s = 24 * 3600 - 60
    world.deliver()
    assert len(services(world).sent) == 2, "not yet a day"


def test_a_service_that_is_down_changes_no_job_and_counts_its_tries(world: NotificationWorld) -> None:
    services(world).error = "not_sent"
    channel, _ = world.service.create(world.project.id, NewChannel(url=TELEGRAM))
    job = world.job()
    for _ in range(20):
        world.deliver()
        world.ahead_s += 1200
    assert len(services(world).sent) == 5, "tries too are within the limit"
    [waiting] = world.deliveries(channel)
    assert (waiting.status, waiting.error) == ("pending", "daily_limit")
    with world.storage.read() as tx:
        assert tx.jobs.get(world.project.id, job.id) == job


def test_tests_are_few(world: NotificationWorld, receiver: Receiver) -> None:
    channel, _ = world.webhook()
    for _ in range(10):
        world.service.test(world.project.id, channel.id)
    with pytest.raises(RateLimited, match="too_many_tests"):
        world.service.test(world.project.id, channel.id)
    assert len(receiver.got) == 10


def test_channels_are_few_and_keep_their_kind(world: NotificationWorld) -> None:
    project = world.project.id
    channel, _ = world.webhook()
    with pytest.raises(InvalidRequest, match="url_not_allowed"):
        world.service.update(project, channel.id, {"url": TELEGRAM})
    with pytest.raises(InvalidRequest, match="invalid_value"):
        world.service.update(project, channel.id, {"events": ["fine_tuning.job.started"]})
    message, secret = world.service.create(project, NewChannel(url=TELEGRAM))
    assert secret is None
    with pytest.raises(Conflict, match="not_a_webhook"):
        world.service.rotate(project, message.id)
    for _ in range(MOST_CHANNELS - 2):
        world.webhook()
    with pytest.raises(Conflict, match="too_many_channels"):
        world.webhook()


def test_a_deleted_channel_takes_what_waits_along(world: NotificationWorld, receiver: Receiver) -> None:
    channel, _ = world.webhook()
    world.job()
    world.service.delete(world.project.id, channel.id)
    world.deliver()
    assert not receiver.got
    with pytest.raises(NotFound):
        world.service.delete(world.project.id, channel.id)


def test_ended_deliveries_are_forgotten_after_a_month(world: NotificationWorld) -> None:
    channel, _ = world.webhook()
    world.job()
    world.deliver()
    with world.storage.write() as tx:
        assert tx.deliveries.forget_before(wall_s() - 60) == 0
        assert tx.deliveries.forget_before(wall_s() + 60) == 1
    assert world.deliveries(channel) == []
