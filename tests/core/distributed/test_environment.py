"""Which rank a process is: torchrun's variables, srun's, and those that contradict each other."""

import pytest

from mt_core.distributed.environment import RankInfo, adopt_slurm, get_rank_info, refuse_nproc
from mt_core.distributed.slurm import PORTS, node_names, step_variables, tasks_per_node
from mt_core.errors import MtError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node01",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07,09]",
}


def test_a_process_of_its_own_is_rank_0_of_1():
    assert get_rank_info({}) == RankInfo(0, 1, 0, 1, launched=False)
    assert get_rank_info({}).label == ""


def test_torchrun_s_variables_are_read():
    assert get_rank_info(TORCHRUN) == RankInfo(3, 4, 1, 2, launched=True)
    assert get_rank_info(TORCHRUN).label == " [rank 3]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not set, but RANK is; set both, or none"),
        ({"RANK": None}, "RANK: not set, but WORLD_SIZE is; set both, or none"),
        ({"RANK": "4"}, "RANK: 4, but WORLD_SIZE is 4; allowed: 0 to 3"),
        ({"RANK": "-1"}, "RANK: '-1'; allowed: a whole number from 0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: 2, but LOCAL_WORLD_SIZE is 2; allowed: 0 to 1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set, but WORLD_SIZE is 4; set where rank 0 is"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http'; allowed: a port number"),
        (
            {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},
            "RANK: 3, but SLURM_PROCID is 2; unset RANK and WORLD_SIZE: srun's are used",
        ),
    ],
)
def test_variables_that_do_not_fit_are_named(changes, message):
    environment = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(MtError) as caught:
        get_rank_info(environment)
    assert message in str(caught.value)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(MtError) as caught:
        get_rank_info(TORCHRUN | {"RANK": "4", "LOCAL_RANK": "2"})
    assert [problem.where for problem in caught.value.problems] == ["RANK", "LOCAL_RANK"]


def test_torchrun_under_srun_is_no_contradiction():
    assert (
        get_rank_info(TORCHRUN | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "TORCHELASTIC_RUN_ID": "x"}).rank
        == 3
    )


def test_a_rank_cannot_start_ranks():
    with pytest.raises(MtError, match="--nproc: 2, but this process is rank 3 of 4 already; leave it out"):
        refuse_nproc(2, get_rank_info(TORCHRUN))
    refuse_nproc(1, get_rank_info(TORCHRUN))
    refuse_nproc(2, RankInfo())


def test_a_task_of_srun_is_a_rank():
    environment = dict(SRUN)
    adopt_slurm(environment)
    assert get_rank_info(environment) == RankInfo(5, 7, 1, 3, launched=True)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert int(environment["MASTER_PORT"]) in PORTS


def test_ranks_of_a_step_agree_on_the_port_and_another_step_has_another():
    port = step_variables(SRUN)["MASTER_PORT"]
    assert step_variables(SRUN | {"SLURM_PROCID": "0"})["MASTER_PORT"] == port
    assert step_variables(SRUN | {"SLURM_STEP_ID": "3"})["MASTER_PORT"] != port
    assert step_variables(SRUN | {"SLURM_JOB_ID": "1235"})["MASTER_PORT"] != port


def test_what_the_user_set_is_kept():
    found = step_variables(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4000")
    environment = SRUN | TORCHRUN
    adopt_slurm(environment)
    assert environment == SRUN | TORCHRUN


def test_tasks_are_spread_evenly_where_srun_does_not_say_how():
    without = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_TASKS_PER_NODE"}
    assert step_variables(without)["LOCAL_WORLD_SIZE"] == "3"
    assert step_variables(without | {"SLURM_NODEID": "0"})["LOCAL_WORLD_SIZE"] == "4"


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_a_batch_script_and_a_shell_of_salloc_are_no_ranks(missing):
    assert step_variables({name: value for name, value in SRUN.items() if name != missing}) == {}


def test_a_step_of_one_task_is_no_rank_although_the_job_has_more():
    assert step_variables(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_PROCID": "7"}, "SLURM_PROCID: 7, but the step has 7 tasks; allowed: 0 to 6"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID: not set, but SLURM_PROCID is; start ranks with srun, or set RANK"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID: 'x'; start ranks with srun"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID: 2, but the step has tasks on 2 nodes; tasks: '4,3'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, "SLURM_STEP_TASKS_PER_NODE: '4(y2)'; allowed: counts"),
    ],
)
def test_srun_s_variables_that_do_not_fit_are_named(changes, message):
    environment = {name: value for name, value in (SRUN | changes).items() if value is not None}
    with pytest.raises(MtError) as caught:
        step_variables(environment)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,07],gpu3", ["node01", "node02", "node03", "node07", "gpu3"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[1-2]n[1,3]", ["rack1n1", "rack1n3", "rack2n1", "rack2n3"]),
        ("n[1-2]-ib,login", ["n1-ib", "n2-ib", "login"]),
    ],
)
def test_node_lists_are_read_as_slurm_writes_them(text, names):
    assert list(node_names(text)) == names


@pytest.mark.parametrize("text", ["", "node[1", "a,,b", "node]1", "n[1-2-3]", "n[a]", "n[]"])
def test_a_node_list_that_is_none_is_refused(text):
    with pytest.raises(MtError, match="SLURM_STEP_NODELIST"):
        list(node_names(text))


def test_tasks_of_each_node_are_counted():
    assert list(tasks_per_node("4(x2),3")) == [4, 4, 3]
