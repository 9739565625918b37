"""Variants of ProPy, each trained with several seeds, against a base: tables and a plot.

    bash scripts/ablate.sh demo scripts/ablations/visibility.json --epochs 8
    seeds="1 2 3 4 5" bash scripts/ablate.sh tvr scripts/ablations/readout.json

The same command continues after an interruption; a finished run is never run again. Flags of
main.py after the grid are for all runs. One run at a time on each GPU (or group of --gpus); without
any, the demo's runs share the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dataloaders.annotations import VAL, Split
from models import load_propy
from scripts.benchmark.harness import CPU_FLOP
from scripts.demo import run as demo
from scripts.reproduce import decisive, environment, read_settings
from utils import RunError
from utils.arguments import parse_args, plain
from utils.command import USER_ERRORS, Parser, number, run_command
from utils.evaluation.embeddings import load_embeddings
from utils.evaluation.ranking import video_scores
from utils.files import locked_folder, read_records, write_json
from utils.misc import usable_cores
from utils.report.ablation import CHOSEN_BY, MOST_SEEDS, TWIN, Ablation, Variant, numbers_of
from utils.report.run_log import best_epoch, read_args, read_epochs
from utils.training.checkpoint import BEST

ROOT = Path(__file__).resolve().parents[1]
# These belong to the runs of a grid, not to its variants.
DECIDED = {
    "do_train", "do_eval", "do_plot", "resume", "output_dir", "seed", "prvr_train_annos",
    "prvr_val_annos", "video_dir", "frame_store",
}  # fmt: skip
NEEDED = "--do_train=1 --prvr_train_annos=x --prvr_val_annos=x --video_dir=x"  # of any training
SETTING, RESULT, OUTPUT = "setting.json", "result.json", "output.txt"
EMBEDDINGS = "embeddings.h5"
MOST_AT_ONCE = 8  # runs without GPUs, each with a thread or more and a GiB or more
TEST_CHOSEN = (
    "Epochs were chosen on the split that is reported, as in the authors' program, so all numbers "
    "are somewhat too high."
)
VAL_CHOSEN = (
    "Epochs were chosen on videos of their own (val); the test videos were scored once a run, "
    "after its training."
)


@dataclass(frozen=True)
class Corpus:
    """Where runs are trained and scored: programs with their flags."""

    name: str
    train: list[str]
    evaluate: list[str]
    made_with: str  # what its videos and the runs' common settings depend on
    note: str
    test: Path | None = None  # the demo's test split, whose videos come in pairs


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: Variant
    seed: int
    folder: Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("corpus", help="demo, demo_large, or a split: that of scripts/prvr_<split>.sh")
    add("grid", type=Path, metavar="JSON", help="base and variants: scripts/ablations/*.json")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default 1 2 3)")
    add("--gpus", type=number(int, 1), default=1,
        help="processes of a run, each with a GPU (default 1)")
    add("--output", type=Path, help="folder (default logs/ablations/<corpus>_<grid>)")
    # fmt: on
    args, common = parser.parse_known_args(argv)
    if not len(args.seeds) == len(set(args.seeds)) <= MOST_SEEDS or min(args.seeds) < 0:
        parser.error(f"--seeds: at most {MOST_SEEDS} numbers from 0, each once")
    variants = read_grid(args.grid, common)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output = args.output or ROOT / "logs/ablations" / f"{args.corpus}_{args.grid.stem}"
    output = output.resolve()
    with locked_folder(output):
        corpus = open_corpus(args.corpus, args.gpus)
        runs = [
            Run(variant, seed, output / variant.name / f"seed_{seed}")
            for seed in args.seeds  # all variants of a seed first: early tables compare them all
            for variant in variants
        ]
        runner = Runner(corpus, args.gpus)
        runner.check(runs)
        try:
            failed = runner.run_all(runs)
        finally:
            report(args.grid.stem, variants, runs, corpus, output)
    if failed:
        raise RunError("\n".join([f"{len(failed)} of {len(runs)} runs failed:", *failed]))


def read_grid(path: Path, common: Sequence[str] = ()) -> list[Variant]:
    """The variants of a grid, the base first. RunError: the file or a flag is wrong.

    {"base": {"asks": …, "flags": {…}}, "variants": {name: {"asks": …, "flags": {…}}, …}}; flags of
    the base and `common` ones are those of every variant, of a flag given twice the last counts.
    """
    try:
        grid = json.loads(path.read_text(encoding="utf-8"))
        base, others = grid.pop("base"), grid.pop("variants")
        cells = {"base": base, **others}
        found = [
            Variant(name, cell.pop("asks"), [f"--{k}={v}" for k, v in cell.pop("flags").items()])
            for name, cell in cells.items()
        ]
        if unknown := [*grid, *(key for cell in cells.values() for key in cell)]:
            raise KeyError(*unknown)
        if len(cells) == len(others):
            raise ValueError("a variant is called base")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a grid (see scripts/ablations): {error!r}") from error
    shared = [*found[0].flags, *common]
    variants = [replace(v, flags=shared + v.flags * (v is not found[0])) for v in found]
    for variant in variants:
        given = {flag.removeprefix("--").partition("=")[0] for flag in variant.flags}
        if decided := given & DECIDED:
            raise RunError(f"{path}: {variant.name}: no grid decides {', '.join(sorted(decided))}")
        if not re.fullmatch(r"\w[\w ,.+=-]*", variant.name):  # it names a folder
            raise RunError(f"{path}: {variant.name}: letters, digits, spaces and ,.+=-_ only")
        try:
            parse_args([*NEEDED.split(), *variant.flags])
        except SystemExit:  # what is wrong is on the terminal
            raise RunError(f"{path}: {variant.name}: main.py refuses its flags") from None
    return variants


def open_corpus(name: str, gpus: int) -> Corpus:
    """The corpus of that name; the demo's is made if it is not there."""
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    for size, folder_name in demo.FOLDERS.items():
        if name == folder_name:
            args = demo.parse_args(["--size", size, "--choose_on", "val"])
            folder = demo.prepare(args)
            return Corpus(
                name,
                [*launcher, "main.py", *demo.flags(demo.training_flags(folder, args))],
                [*launcher, "main.py", *demo.flags(demo.evaluation_flags(folder, args))],
                (folder / "settings.json").read_text(),
                VAL_CHOSEN,
                folder / "test.jsonl",
            )
    script = f"scripts/prvr_{name}.sh"
    if not (ROOT / script).is_file():
        raise RunError(f"{name}: neither demo, demo_large nor a split with a {script}")
    evaluate = ["--do_train=0", "--do_eval=1", "--subtask_type=VCMR"]
    program = ["env", f"gpus={gpus}", "bash", script] if gpus > 1 else ["bash", script]
    train = [*program, "--do_train=1", "--do_eval=0"]
    common = read_settings(name)  # with the variables that are set outside
    sources = ("prvr_train_annos", "prvr_val_annos", "video_dir", "frame_store", "subtask_type")
    chosen = {name: plain(common)[name] for name in sources}
    made_with = json.dumps(chosen | decisive(common))
    return Corpus(name, train, [*program, *evaluate], made_with, TEST_CHOSEN)


class Runner:
    """Runs everything that is not finished, one run in each place."""

    def __init__(self, corpus: Corpus, gpus: int) -> None:
        self.corpus = corpus
        self.lock, self.processes, self.stopped = threading.Lock(), set(), False
        self.free: queue.Queue[dict[str, str]] = queue.Queue()
        for place in run_places(gpus, side_by_side=corpus.test is not None):
            self.free.put(place)

    def run_all(self, runs: Sequence[Run]) -> list[str]:
        """Returns why runs failed."""
        waiting = [run for run in runs if not (run.folder / RESULT).is_file()]
        done, failed = len(runs) - len(waiting), []
        with (
            tqdm(total=len(runs), initial=done, desc="runs", unit="run") as bar,
            ThreadPoolExecutor(self.free.qsize()) as pool,
            self._stopping(pool),
        ):
            futures = {pool.submit(self.run, run): run for run in waiting}
            for future in as_completed(futures):
                run = futures[future]
                try:
                    numbers = future.result()
                    bar.set_postfix_str(f"{run.folder.parent.name} SumR {numbers['SumR']:.1f}")
                except USER_ERRORS as error:
                    failed.append(str(error))
                    bar.write(str(error), file=sys.stderr)
                bar.update()
        return failed

    def check(self, runs: Sequence[Run]) -> None:
        """RunError: what is in a run's folder was made with other flags or settings."""
        for run in runs:
            setting, path = self.setting(run), run.folder / SETTING
            before = json.loads(path.read_text()) if path.is_file() else setting
            if changed := [key for key in setting if before.get(key) != setting[key]]:
                raise RunError(
                    f"{run.folder}: a run with other {' and '.join(changed)}: give another "
                    "--output, rename the variant, or remove the folder"
                )

    def setting(self, run: Run) -> dict:
        corpus = {"corpus": self.corpus.name, "settings": self.corpus.made_with}
        return corpus | {"flags": run.variant.flags}

    def run(self, run: Run) -> dict[str, float]:
        """Train, score, measure; what an earlier call has done of it stays done."""
        place = self.free.get()
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_json(run.folder / SETTING, self.setting(run))
            own = [*run.variant.flags, f"--seed={run.seed}", f"--output_dir={run.folder}"]
            # CLIP alone is the same for every run, and no table here has it
            train = [*self.corpus.train, "--log_zero_shot=0", *own, "--resume=auto"]
            self._call(train, run.folder, place)
            evaluated = run.folder / "eval.jsonl"
            if not (evaluated.is_file() and read_records(evaluated)):
                own += [f"--resume={run.folder / BEST}"]
                if self.corpus.test:
                    own += [f"--save_embeddings={run.folder / EMBEDDINGS}"]
                self._call([*self.corpus.evaluate, *own], run.folder, place)
            numbers = measure(run.folder, self.corpus.test)
            write_json(run.folder / RESULT, numbers)
            return numbers
        finally:
            self.free.put(place)

    def _call(self, command: list[str], folder: Path, place: dict[str, str]) -> None:
        with (folder / OUTPUT).open("ab+") as file:
            with self.lock:
                if self.stopped:
                    raise RunError(f"{folder}: stopped")
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment(**place), stdin=subprocess.DEVNULL,
                    stdout=file, stderr=file,
                )  # fmt: skip
                self.processes.add(process)
            status = process.wait()
            self.processes.discard(process)
            if status:
                said = (folder / OUTPUT).read_text(errors="replace").split("\n")
                last = next((line for line in reversed(said) if line.strip()), "")[-500:]
                raise RunError(f"{folder}: ended with status {status}: {last} ({OUTPUT} has all)")

    @contextlib.contextmanager
    def _stopping(self, pool: ThreadPoolExecutor):
        """An interruption stops all runs, which save where they are, and starts no other."""
        try:
            yield
        except BaseException:
            with self.lock:
                self.stopped = True
                for process in [*self.processes]:  # others end meanwhile
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def run_places(gpus: int, side_by_side: bool) -> list[dict[str, str]]:
    """The environment of each place where a run can be: groups of GPUs; without any, shares of the
    cores if runs are small enough to be `side_by_side`, else one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = named.split(",")[:count] if named else [str(i) for i in range(count)]
    if not names and not side_by_side:
        return [{}]
    if not names:  # small networks gain more by runs side by side than by threads
        cores = usable_cores()
        places = max(1, min(cores // gpus, MOST_AT_ONCE))
        return [{"OMP_NUM_THREADS": str(max(1, cores // (places * gpus)))}] * places
    if gpus > len(names):
        raise RunError(f"--gpus {gpus}: this machine has {len(names)}")
    groups = [names[i : i + gpus] for i in range(0, len(names) - gpus + 1, gpus)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def measure(folder: Path, test: Path | None) -> dict[str, float]:
    """All numbers of a finished run, by name.

    Args:
        test: of the demo, for the scores against a video's twin.
    """
    epochs, evaluation = read_epochs(folder), read_records(folder / "eval.jsonl")[-1]
    model = load_propy(folder / BEST).requires_grad_(False)
    numbers = numbers_of(evaluation["metrics"]) | {
        "epoch": evaluation["epoch"],
        "trainable": read_args(folder)["trainable"] / 1e6,
        "step_time": median(epoch["step_time"] for epoch in epochs),
        "memory_gib": max(epoch["memory_gib"] for epoch in epochs),
    }
    side = model.input_resolution
    frames = torch.zeros(1, model.pyramid.num_frames, 3, side, side, dtype=torch.uint8)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FLOP)
    with torch.inference_mode(), counter:
        model.encode_video(frames)
    numbers["gflop"] = counter.get_total_flops() / 1e9
    if test:
        if "SumR" in (best := best_epoch(epochs)):
            numbers[CHOSEN_BY] = best["SumR"]
        split, saved = Split.read(test, VAL), load_embeddings(folder / EMBEDDINGS).embeddings
        scores = video_scores(saved.texts, saved.events, readout=model.readout)
        for kind in demo.QUERY_TYPES:
            chosen = torch.tensor([query.query_type == kind for query in split.queries])
            if chosen.any():
                versus = demo.against_twin(scores[chosen], split.target[chosen])
                numbers[f"{TWIN}/{kind}"] = versus
    return numbers


def report(
    title: str, variants: list[Variant], runs: Sequence[Run], corpus: Corpus, output: Path
) -> None:
    """Tables and plot of the runs that are finished."""
    finished = [run for run in runs if (run.folder / RESULT).is_file()]
    results: dict[str, dict[int, dict]] = {variant.name: {} for variant in variants}
    for run in finished:
        numbers = json.loads((run.folder / RESULT).read_text())
        results[run.variant.name][run.seed] = numbers
    results = {name: found for name, found in results.items() if found}
    if not results:
        return
    revisions = {str(read_args(run.folder).get("git")) for run in finished}
    shown = sorted(git[:12] + "-dirty" * git.endswith("-dirty") for git in revisions)
    notes = [corpus.note, f"Corpus {corpus.name}, at {', '.join(shown)}."]
    if len(finished) < len(runs):
        notes.append(f"{len(finished)} of {len(runs)} runs are finished.")
    ablation = Ablation(f"{title} on {corpus.name}", variants, results, notes)
    paths = ablation.write(output)
    print(ablation.markdown(), *paths, sep="\n")


if __name__ == "__main__":
    run_command(main)
