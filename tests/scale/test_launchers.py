"""What launchers say of a process's share of the work."""

import pytest

from ckptconv.errors import UsageError
from ckptconv.stage.launchers import share_of

SLURM = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "5",
    "SLURM_ARRAY_TASK_STEP": "2",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "of", "share"),
    [
        (SLURM, None, (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}, None, (0, 1)),
        (TORCHRUN, None, (1, 4)),
        ({**TORCHRUN, **SLURM}, None, (2, 3)),
        ({"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "5"}, None, (3, 5)),
        ({"JOB_COMPLETION_INDEX": "3"}, 8, (3, 8)),
        ({"RANK": "1"}, None, None),
        ({"HOME": "/"}, 8, None),
    ],
)
def test_shares(environment, of, share):
    assert share_of(environment, of) == share


@pytest.mark.parametrize(
    ("environment", "what", "where"),
    [
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "4"}, "the launcher's environment says no share of the work", "SLURM_ARRAY_TASK_STEP"),
        ({**SLURM, "SLURM_ARRAY_TASK_STEP": "0"}, "the launcher's environment says no share of the work", "SLURM_ARRAY_TASK_STEP"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "7"}, "there is no share 3 of 3: the first is 0, the last 2", "SLURM_ARRAY_TASK_ID"),
        (
            {**SLURM, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_STEP": "1"},
            "there is no share -1 of 3: the first is 0, the last 2",
            "SLURM_ARRAY_TASK_ID",
        ),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "the launcher's environment says no share of the work", "SLURM_ARRAY_TASK_COUNT"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "the launcher's environment says no share of the work", "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 30}, "the launcher's environment says no share of the work", "WORLD_SIZE"),
        ({"JOB_COMPLETION_INDEX": "3"}, "a Kubernetes Job tells its index, but not of how many", "JOB_COMPLETION_INDEX=3"),
    ],
)
def test_what_makes_no_share_is_refused(environment, what, where):
    with pytest.raises(UsageError) as raised:
        share_of(environment)
    (problem,) = raised.value.problems
    assert (problem.code, problem.what, problem.where) == ("CK107", what, where)
    assert "--of" in problem.try_ or "share" in problem.what
