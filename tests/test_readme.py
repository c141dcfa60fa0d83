"""The README's commands, run as they stand, in a checkout of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- tested -->\n```bash\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "corpora", "data_prep", "launch", "mamba_pretrain"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def shell(script: str, directory: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_commands_of_the_readme_work(block: str, checkout: Path) -> None:
    shell(re.sub(r"train\.tokens=\S+", "train.tokens=8192 eval.max_windows=8", block), checkout)


@pytest.mark.slow
def test_the_quickstart_works_from_end_to_end(checkout: Path, tmp_path: Path) -> None:
    # Exit code 4: everything worked, and the model does not beat xz, for which 40 steps are too few.
    shell(f"python -m launch.quickstart --tokens 40960 --output {tmp_path / 'quickstart'} || [ $? -eq 4 ]", checkout)
    made = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert made >= {"sotu.model", "data", "run", "eval.json", "comparison.md", "loss.png", "perplexity.png"}
    assert made >= {"hf", "mamba_ssm"}


def test_the_tree_in_the_readme_names_every_module() -> None:
    tree = README.split("## The tree")[1].split("\n## ")[0]
    modules = [p for p in (ROOT / "mamba_pretrain").rglob("*.py") if p.name != "__init__.py"]
    assert modules
    assert [str(p) for p in modules if p.name not in tree] == []
    listed = set(re.findall(r"\b[a-z_]+\.py\b", tree))
    existing = {p.name for room in ("mamba_pretrain", "data_prep", "launch") for p in (ROOT / room).rglob("*.py")}
    assert listed <= existing, f"the tree names {listed - existing}, which do not exist"


@pytest.mark.parametrize("name", ["README.md", "data_prep/README.md"])
def test_links_and_modules_that_a_readme_names_exist(name: str) -> None:
    file = ROOT / name
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", file.read_text())
    assert links
    for path, heading in links:
        target = file.parent / path if path else file
        assert target.is_file(), path
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}
    modules = set(re.findall(r"python -m ((?:data_prep|launch|benchmarks)\.\w+)", file.read_text()))
    assert modules
    assert not [one for one in modules if not (ROOT / f"{one.replace('.', '/')}.py").is_file()]


def test_the_shipped_corpora_stay_under_2_mb() -> None:
    assert 0 < sum(path.stat().st_size for path in (ROOT / "corpora").iterdir()) < 2e6
