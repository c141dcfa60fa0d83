"""Settings that must stand before torch is imported, and the run that several files compare with."""

import os
import signal
from pathlib import Path

import pytest

# The suite runs several processes on few cores. OpenMP threads that wait for a core they do not get make tiny tensor
# operations tens of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# nohup and background shells ignore these for all that they start; the processes under test must get them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

from mamba_pretrain.train import run  # noqa: E402
from tests.helpers.corpora import make_dataset  # noqa: E402
from tests.helpers.runs import small_config  # noqa: E402


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", n_documents=80)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of twelve steps."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert run(small_config(dataset, directory)) == 0
    return directory


# The files that take longest, those first: no worker is then long alone at the end (with --no-loadscope-reorder).
LONGEST = [
    *("distributed/test_two_hosts", "plan/test_memory", "test_readme", "distributed/test_launchers"),
    *("distributed/test_engines", "benchmarks/test_scripts", "distributed/test_moving", "distributed/test_faults"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"tests/{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.location[0], len(order)))
