"""What the READMEs name is there: linked files and headings, scripts, modules, flags, paths."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md"))]
READMES += [ROOT / "utils/search/README.md", ROOT / "scripts/ablations/README.md"]
ROOMS = ("models/", "modules/", "dataloaders/", "utils/", "scripts/", "tests/")
# Flags of TensorBoard, torchrun and Slurm.
OTHERS = {
    "--logdir", "--standalone", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint",
    "--rdzv_id", "--nodes", "--ntasks", "--gpus",
}  # fmt: skip

each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))


def anchors(path: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def flags() -> set[str]:
    """Every flag of every program, as argparse and the shell scripts spell them."""
    sources = [ROOT / "main.py", *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]
    sources += [ROOT / "scripts/setup.sh"]
    words = (path.read_text(encoding="utf-8") for path in sources if "test_" not in path.name)
    return {flag for text in words for flag in re.findall(r"[\"' (](--[a-z]\w*)", text)}


@each_readme
def test_links_lead_somewhere(readme: Path) -> None:
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", readme.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (readme.parent / name).resolve() if name else readme
        assert path.exists(), f"[{text}]({target})"
        assert not anchor or anchor in anchors(path), f"[{text}]({target})"


@each_readme
def test_named_programs_and_files_exist(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    modules |= set(re.findall(r"`((?:scripts|models|modules|utils)\.[\w.]+)", text))
    for module in modules - {"torch.distributed.run"}:
        path = ROOT / module.replace(".", "/")
        above = path.parent.with_suffix(".py")  # a function's module
        assert any(p.exists() for p in (path, path.with_suffix(".py"), above)), module
    paths = set(re.findall(r"bash ([\w./-]+\.sh|\.ci/run)", text))
    paths |= {p for p in re.findall(r"`([\w./-]+)`", text) if p.startswith(ROOMS)}
    for path in paths:
        assert (ROOT / path).exists() or shutil.which(path), path


@each_readme
def test_named_flags_exist(readme: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*", readme.read_text(encoding="utf-8")))
    assert named - OTHERS <= flags()


@each_readme
def test_variables_before_a_script_are_known(readme: Path) -> None:
    """Of the launcher, which passes those on that are flags, or of the script itself."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    for words, script in re.findall(r"^((?:\w+=\S+ |\w+=\"[^\"]*\" +)+) *bash (\S+)", text, re.M):
        known = (ROOT / script).read_text(encoding="utf-8")
        known += (ROOT / "scripts/launch.sh").read_text(encoding="utf-8")
        for name in re.findall(r"(\w+)=", words):
            assert f"--{name}" in flags() or name in known, f"{name}= {script}"


def test_readmes_and_their_figure_are_in_the_repository() -> None:
    """Data folders are ignored but for their READMEs."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    files = [*READMES, ROOT / "scripts/demo/overview.png"]
    done = subprocess.run(
        [git, "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 1, done.stdout.decode()
    assert files[-1].stat().st_size <= 150 * 1024
