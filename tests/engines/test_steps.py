"""How much of the prompts one step takes in."""

from tests.engines.test_prefixes import World
from tunewright.rendering.renderer import Renderer


def test_prompts_are_read_in_long_steps_while_most_rows_wait_for_them(renderer: Renderer) -> None:
    """The steps of `World` take 11 prompt tokens, or 5 beside rows that decode and are not outnumbered."""
    world = World(renderer, slots=8, context=64)
    rows = [world.add([3 + n] * 10, 30, None) for n in range(5)]
    taken: list[tuple[int, int]] = []
    while not all(row.decoding for row in rows):
        chosen = world.running.parts(5, 11)
        decoding = sum(part.decoding for _, part in chosen)
        taken.append((decoding, sum(len(part.tokens) for _, part in chosen) - decoding))
        world.step(4)
    assert taken == [(0, 11), (1, 11), (2, 11), (3, 5), (3, 5), (4, 5), (4, 2)]
