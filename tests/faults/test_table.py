"""The README's table of failures says what these tests show."""

import re
from pathlib import Path

import pytest

from tests.faults.table import FAULTS, Fault

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_readme_states_the_bound_of_every_fault_and_names_its_test(fault: Fault) -> None:
    path, _, test = fault.test.partition("::")
    text = (Path(__file__).parent / path).read_text()
    assert re.search(rf"def {test}\(", text)
    assert f'measured("{fault.name}"' in text
    lines = [line for line in README.splitlines() if f"`tests/faults/{fault.test}`" in line]
    assert lines, f"the README has no row for {fault.name}"
    assert all(fault.bound in line for line in lines)
