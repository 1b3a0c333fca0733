"""The number of threads is measured, unless it is given."""

import os

import pytest
import torch

from tunewright.recipes.threads import better, choose_threads


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_given_number_is_taken() -> None:
    assert choose_threads(3) == 3


def test_a_measured_number_is_one_or_all() -> None:
    assert choose_threads(0) in (1, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("one_s", "all_s", "chosen"), [(1.0, 0.5, 8), (1.0, 0.83, 8), (1.0, 0.9, 1), (1.0, 10.0, 1)])
def test_all_cores_must_be_worth_it(one_s: float, all_s: float, chosen: int) -> None:
    assert better(one_s, all_s, cores=8) == chosen
