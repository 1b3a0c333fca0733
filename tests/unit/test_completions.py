"""What a completion refuses before any engine is asked, and what a deletion at a bad moment looks like."""

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_models_service import World
from tunewright.accounts.records import Caller
from tunewright.accounts.usage import UsageLedger
from tunewright.completions.metering import Metering
from tunewright.completions.metrics import ServingMetrics
from tunewright.completions.service import CompletionService
from tunewright.completions.vocabulary import ChatRequest, Finish, Sampling, TextDelta
from tunewright.deployments.ports import Done, Generate, TokenText
from tunewright.deployments.serving import Serving
from tunewright.deployments.workers import engine_lost
from tunewright.errors import Conflict, InvalidRequest, NotFound, RateLimited, TunewrightError, Unavailable
from tunewright.models.records import Base, TunedModel
from tunewright.rendering.conversation import Conversation, Message
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import Settings

CALLER = Caller(project_id="project-1", key_id="k")


class OnePool:
    """Answers "hi", or fails as it is told after calling `before`."""

    def __init__(self) -> None:
        self.error: TunewrightError | None = None
        self.before = lambda: None
        self.asked: list[Generate] = []
        self.full: TunewrightError | None = None
        self.losses = 0
        """How many answers from now on break off after their first piece."""

    def check_room(self, base: Base) -> None:
        if self.full is not None:
            raise self.full

    async def generate(
        self, base: Base, tuned: TunedModel | None, request: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        self.asked.append(request)
        self.before()
        if self.error is not None:
            raise self.error
        yield TokenText(text="hi", n_tokens=1)
        if self.losses:
            self.losses -= 1
            raise engine_lost()
        yield Done(reason="stop", prompt_tokens=len(request.prompt_ids), completion_tokens=2)


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path) -> Iterator[World]:
    world = World(tmp_path, tiny_base)
    yield world
    world.storage.close()


@pytest.fixture
def pool() -> OnePool:
    return OnePool()


@pytest.fixture
def ledger(world: World) -> Iterator[UsageLedger]:
    ledger = UsageLedger(world.storage, "server-1", 1)
    ledger.start()
    yield ledger
    ledger.stop()


@pytest.fixture
def service(world: World, pool: OnePool, ledger: UsageLedger) -> CompletionService:
    metering = Metering(ledger, ServingMetrics(ledger, 1))
    settings, instances = Settings(home=world.home.root), None
    serving = Serving(world.storage, world.models, pool, instances, world.home, settings)  # type: ignore[arg-type]
    return CompletionService(world.models, serving, settings, metering)


def request_to(model: str, text: str = "hello", max_tokens: int | None = None) -> ChatRequest:
    conversation = Conversation(messages=(Message(role="user", content=text),))
    return ChatRequest(model=model, conversation=conversation, sampling=Sampling(max_tokens=max_tokens))


def tuned(world: World, renderer_hash: str | None = None) -> TunedModel:
    model = world.reserve(world.mine)
    (world.home.adapters / model.id).mkdir(exist_ok=True)
    with world.storage.write() as tx:
        return world.models.publish(
            tx,
            model,
            adapter_path=model.id,
            adapter_sha256="a" * 64,
            renderer_hash=renderer_hash or renderer_of(world.home.bases / "tiny").hash,
            checkpoint_step=1,
            proof={"tensors": 2, "tensors_applied": 2, "max_logit_shift": 1.0},
        )


async def test_an_answer_has_its_text_and_its_counts(service: CompletionService, world: World, pool: OnePool) -> None:
    answer = await service.complete(CALLER, request_to(tuned(world).name, max_tokens=7))
    assert (answer.choices[0].text, answer.choices[0].reason) == ("hi", "stop")
    assert answer.usage.completion_tokens == 2
    assert pool.asked[0].max_tokens == 7 and pool.asked[0].stop_ids


async def test_a_model_trained_with_another_template_is_refused(service: CompletionService, world: World) -> None:
    with pytest.raises(Conflict) as caught:
        await service.complete(CALLER, request_to(tuned(world, renderer_hash="0" * 64).name))
    assert caught.value.code == "renderer_changed"


async def test_a_model_deleted_while_it_is_called_is_not_found(
    service: CompletionService, world: World, pool: OnePool
) -> None:
    model = tuned(world)
    pool.error = InvalidRequest("adapter_invalid", "its files are gone")
    pool.before = lambda: world.models.delete("project-1", model.name) and None
    with pytest.raises(NotFound) as caught:
        await service.complete(CALLER, request_to(model.name))
    assert caught.value.code == "model_not_found"


async def test_a_damaged_adapter_of_a_living_model_stays_an_error_of_its_own(
    service: CompletionService, world: World, pool: OnePool
) -> None:
    pool.error = InvalidRequest("adapter_invalid", "its files are damaged")
    with pytest.raises(Conflict) as caught:
        await service.complete(CALLER, request_to(tuned(world).name))
    assert caught.value.code == "adapter_invalid"


async def test_a_prompt_over_the_context_never_reaches_the_engine(service: CompletionService, pool: OnePool) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await service.complete(CALLER, request_to("tiny", "word " * 5000))
    assert caught.value.code == "context_length_exceeded" and not pool.asked


async def test_a_left_stream_gives_its_place_back(service: CompletionService) -> None:
    stream = service.stream(CALLER, request_to("tiny"))
    first = await anext(stream)
    assert isinstance(first, TextDelta) and service._under_way[CALLER.key_id] == 1
    await stream.aclose()
    assert CALLER.key_id not in service._under_way


async def test_an_answer_that_is_begun_again_is_one_row(
    service: CompletionService, world: World, pool: OnePool, ledger: UsageLedger
) -> None:
    pool.losses = 1
    answer = await service.complete(CALLER, request_to("tiny"))
    assert (answer.choices[0].text, len(pool.asked)) == ("hi", 2)
    pool.losses = 2
    with pytest.raises(Unavailable):
        await service.complete(CALLER, request_to("tiny"))
    assert len(pool.asked) == 4
    pool.losses = 1
    with pytest.raises(Unavailable):
        async for _ in service.stream(CALLER, request_to("tiny")):
            pass
    assert len(pool.asked) == 5, "a stream has been seen, so it is not begun again"
    ledger.stop()
    with world.storage.read() as tx:
        rows = tx.usage.list(CALLER.project_id, status=None, model=None, after=None, limit=9)
    told = [(row.status, row.error_code, row.completion_tokens) for row in rows]
    assert sorted(told) == [("error", "engine_lost", 0), ("error", "engine_lost", 1), ("ok", None, 2)]
    assert not service._under_way


async def test_choices_share_the_prompt_and_differ_in_their_seeds(service: CompletionService, pool: OnePool) -> None:
    request = msgspec.structs.replace(request_to("tiny"), n=3, sampling=Sampling(seed=7))
    deltas = [delta async for delta in service.stream(CALLER, request)]
    ends = [delta for delta in deltas if isinstance(delta, Finish)]
    assert sorted(end.choice for end in ends) == [0, 1, 2]
    assert [end.usage is None for end in ends] == [True, True, False] and deltas[-1] is ends[-1]
    usage = ends[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(pool.asked[0].prompt_ids), 6)
    assert sorted(order.seed or 0 for order in pool.asked) == [7, 8, 9]
    assert [choice.text for choice in (await service.complete(CALLER, request)).choices] == ["hi"] * 3
    assert not service._under_way


async def test_an_error_of_one_choice_ends_all(service: CompletionService, pool: OnePool) -> None:
    pool.error = InvalidRequest("adapter_invalid", "its files are damaged")
    with pytest.raises(InvalidRequest):
        await service.complete(CALLER, msgspec.structs.replace(request_to("tiny"), n=3))
    assert not service._under_way


async def test_choices_count_towards_the_limit_of_a_key(service: CompletionService, pool: OnePool) -> None:
    service._settings = service._settings.model_copy(update={"max_streams_per_key": 2})
    with pytest.raises(RateLimited):
        await service.complete(CALLER, msgspec.structs.replace(request_to("tiny"), n=3))
    assert not pool.asked


async def test_a_bias_of_an_unknown_token_is_refused(service: CompletionService, pool: OnePool) -> None:
    request = msgspec.structs.replace(request_to("tiny"), sampling=Sampling(logit_bias={10**8: 1.0}))
    with pytest.raises(InvalidRequest) as caught:
        await service.complete(CALLER, request)
    assert caught.value.param == "logit_bias" and not pool.asked
