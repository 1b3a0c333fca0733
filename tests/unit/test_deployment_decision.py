"""What the reconcile loop decides, over every mixture of states and long random histories."""

from hypothesis import given
from hypothesis import strategies as st

from tunewright.deployments.decision import (
    BACKING_OFF,
    DRAINING,
    READY,
    SILENT,
    STARTING,
    Drain,
    End,
    Fact,
    Start,
    decide,
    pause_s,
    status_of,
)

STATES = (STARTING, READY, SILENT, BACKING_OFF, DRAINING)


def ready(number: int, **more: object) -> Fact:
    return Fact(number=number, state=READY, **more)  # type: ignore[arg-type]


def test_what_is_missing_is_started() -> None:
    assert decide(2, [], 1) == [Start(1), Start(2)]
    assert decide(2, [ready(1)], 7) == [Start(7)]
    assert decide(2, [ready(1), Fact(number=2, state=STARTING)], 3) == []
    assert decide(1, [Fact(number=4, state=BACKING_OFF)], 5) == [], "its pause is not over"
    assert decide(1, [Fact(number=4, state=BACKING_OFF, due=True)], 5) == [Start(4)], "in its old place"


def test_what_is_surplus_goes_the_idle_before_the_busy() -> None:
    assert decide(1, [ready(1, in_flight=2), ready(2), Fact(number=3, state=STARTING)], 4) == [End(2), End(3)]
    assert decide(1, [ready(1, in_flight=3), ready(2, in_flight=2)], 3) == [Drain(2)], "its answers may end"
    assert decide(0, [ready(1, in_flight=1), ready(2)], 3) == [Drain(1), End(2)]


def test_one_that_drains_ends_with_its_last_answer() -> None:
    assert decide(1, [ready(1), Fact(number=2, state=DRAINING, in_flight=1)], 3) == []
    assert decide(1, [ready(1), Fact(number=2, state=DRAINING)], 3) == [End(2)]
    assert decide(1, [ready(1), Fact(number=2, state=DRAINING, in_flight=1, overdue=True)], 3) == [End(2)]


def test_replacement_is_one_after_another_and_never_below_the_wish() -> None:
    old = [ready(number, current=False, in_flight=1) for number in (1, 2)]
    assert decide(2, old, 3) == [Start(3)]
    starting = Fact(number=3, state=STARTING)
    assert decide(2, [*old, starting], 4) == [], "the new one must be ready first"
    assert decide(2, [*old, ready(3)], 4) == [Drain(2), Start(4)]
    dead = Fact(number=1, state=SILENT, current=False)
    assert decide(1, [dead], 2) == [End(1), Start(2)], "an old one that does not serve is no loss"


facts_of = st.lists(
    st.builds(
        lambda state, current, in_flight, due, overdue: (state, current, in_flight, due, overdue),
        st.sampled_from(STATES),
        st.booleans(),
        st.integers(0, 3),
        st.booleans(),
        st.booleans(),
    ),
    max_size=7,
).map(
    lambda rows: [
        Fact(number=i, state=state, current=current, in_flight=busy, due=due, overdue=overdue)
        for i, (state, current, busy, due, overdue) in enumerate(rows)
    ]
)


@given(st.integers(0, 4), facts_of)
def test_serving_replicas_are_never_given_up_below_the_wish(wanted: int, facts: list[Fact]) -> None:
    actions = decide(wanted, facts, 100)
    numbers = [action.number for action in actions]
    assert len(set(numbers)) == len(numbers), "one action for each replica"
    gone = {action.number for action in actions if not isinstance(action, Start)}
    before = [fact.number for fact in facts if fact.state == READY]
    assert len(set(before) - gone) >= min(wanted, len(before))
    alive = sum(fact.state not in (DRAINING,) for fact in facts if fact.number not in gone)
    new = sum(isinstance(action, Start) and action.number >= 100 for action in actions)
    assert new == 0 or alive + new <= wanted + 1, "at most one more than wanted while others are replaced"


class World:
    """Replicas that start, answer and go as actions and chance want."""

    def __init__(self, facts: list[Fact]) -> None:
        self.facts = {fact.number: fact for fact in facts}
        self.next_number = 1 + max(self.facts, default=0)

    def act(self, wanted: int) -> int:
        actions = decide(wanted, list(self.facts.values()), self.next_number)
        for action in actions:
            if isinstance(action, End):
                del self.facts[action.number]
            else:
                state = STARTING if isinstance(action, Start) else DRAINING
                in_flight = 0 if isinstance(action, Start) else self.facts[action.number].in_flight
                self.facts[action.number] = Fact(number=action.number, state=state, in_flight=in_flight)
                self.next_number = max(self.next_number, action.number + 1)
        return len(actions)

    def quiet(self) -> None:
        """Time passes and nothing goes wrong."""
        after = {STARTING: READY, SILENT: READY, BACKING_OFF: BACKING_OFF, READY: READY, DRAINING: DRAINING}
        self.facts = {
            number: Fact(number=number, state=after[fact.state], current=fact.current, due=True)
            for number, fact in self.facts.items()
        }


@given(st.integers(0, 4), facts_of)
def test_whatever_happened_the_wish_comes_true(wanted: int, facts: list[Fact]) -> None:
    world = World(facts)
    for _ in range(40):
        world.act(wanted)
        world.quiet()
    assert world.act(wanted) == 0, "and then there is peace"
    assert [(fact.state, fact.current) for fact in world.facts.values()] == [(READY, True)] * wanted


def test_words_for_it() -> None:
    assert status_of(0, [], failures=0, was_ready=True) == "stopped"
    assert status_of(1, [Fact(number=1, state=STARTING)], failures=0, was_ready=False) == "deploying"
    assert status_of(2, [ready(1), ready(2)], failures=0, was_ready=False) == "ready"
    assert status_of(1, [ready(1), ready(2)], failures=0, was_ready=True) == "scaling"
    assert status_of(1, [ready(1, current=False)], failures=0, was_ready=True) == "scaling"
    down = [Fact(number=1, state=BACKING_OFF)]
    assert [status_of(1, down, failures=n, was_ready=True) for n in (2, 3)] == ["scaling", "failed"]
    assert status_of(2, [ready(2), *down], failures=9, was_ready=True) == "scaling", "one still answers"


def test_pauses_grow_up_to_a_minute() -> None:
    assert [pause_s(n) for n in (0, 1, 2, 3, 4, 7, 8, 9, 5000)] == [0, 0, 1, 2, 4, 32, 60, 60, 60]
