"""Every denoiser class of diffusers works, or is refused by name: python -m tests.zoo shows how."""

from __future__ import annotations

import pytest

from tests.zoo.case import FAILS, ONE_SIZE, REFUSED, UNSAVED, WORKS, Case
from tests.zoo.cases import CASES
from tests.zoo.check import judge, quiet
from tests.zoo.classes import LEFT_OUT, denoisers


def as_parameter(case: Case):
    return pytest.param(case, id=case.name, marks=pytest.mark.slow)


def test_every_denoiser_class_has_a_case():
    cased = {case.name.split(":")[0] for case in CASES}
    assert denoisers() - cased - set(LEFT_OUT) == set()


def test_what_is_left_out_exists_and_has_no_case():
    cased = {case.name.split(":")[0] for case in CASES}
    assert set(LEFT_OUT) <= denoisers() - cased


def test_names_are_unique_and_no_case_may_fail():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.expect for case in CASES} <= {WORKS, ONE_SIZE, UNSAVED, REFUSED}
    assert FAILS not in {case.expect for case in CASES}


@pytest.mark.filterwarnings("ignore")  # what diffusers says about itself
@pytest.mark.parametrize("case", [as_parameter(case) for case in CASES])
def test_case(case):
    quiet()
    verdict = judge(case)
    said = "\n".join([verdict.why, *verdict.where])
    assert verdict.outcome == case.expect, said
