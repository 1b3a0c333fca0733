"""What a completion refuses before any engine is asked, and what a deletion at a bad moment looks like."""

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from tests.unit.test_models_service import World
from tunewright.accounts.records import Caller
from tunewright.completions.service import CompletionService
from tunewright.completions.vocabulary import ChatRequest, Sampling, TextDelta
from tunewright.deployments.ports import Done, Generate, TokenText
from tunewright.errors import Conflict, InvalidRequest, NotFound, TunewrightError
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

    async def generate(
        self, base: Base, tuned: TunedModel | None, request: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        self.asked.append(request)
        self.before()
        if self.error is not None:
            raise self.error
        yield TokenText(text="hi", n_tokens=1)
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
def service(world: World, pool: OnePool) -> CompletionService:
    return CompletionService(world.models, pool, Settings(home=world.home.root))  # type: ignore[arg-type]


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
    assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("hi", "stop", 2)
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
    with pytest.raises(InvalidRequest) as caught:
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
