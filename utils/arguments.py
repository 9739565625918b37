"""The flags of main.py: names, published values, and the combinations that make no sense.

A flag is added with its reader and removed with it: a field of one of the configurations, which
`config_from` fills, or main.py.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from modules.pyramid import VISIBILITIES
from modules.readout import READOUTS
from utils.command import Parser, number
from utils.evaluation.published import DATATYPES, WINDOW_RULES
from utils.evaluation.rows import ZERO_SHOT
from utils.misc import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PLOT_STYLES = ("readable", "authors")  # of utils.pictures.draw, which imports matplotlib
AUTO = "auto"  # --resume: the output folder's own checkpoint; a file of that name is ./auto

# Fields of configurations whose flags have other names, those of the authors' program.
FLAG_OF_FIELD = {
    "num_prompts": "Nvp",
    "adapter_kernel": "temp_kernel_sz",
    "clip_name": "pretrained_clip_name",
}

Config = TypeVar("Config")


def config_from(cls: type[Config], args: argparse.Namespace, **given: Any) -> Config:
    """A configuration (a dataclass) of the flags of its fields' names; `given` are no flags."""
    names = [field.name for field in fields(cls) if field.name not in given]
    return cls(**{name: getattr(args, FLAG_OF_FIELD.get(name, name)) for name in names}, **given)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags by name, as JSON and checkpoints hold them."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; an impossible combination ends the program with a message."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.do_train or args.do_eval or args.do_plot):
        parser.error("nothing to do: give --do_train 1, --do_eval 1, --do_plot 1 or several")
    if not args.load_embeddings and bool(args.video_dir) == bool(args.frame_store):
        parser.error("give one of --video_dir and --frame_store: where the clips are")
    if args.do_train and not args.prvr_train_annos:
        parser.error("--do_train 1 needs --prvr_train_annos")
    if args.load_embeddings and (args.do_train or args.do_plot or args.save_embeddings):
        parser.error("--load_embeddings is for --do_eval 1 alone: everything else needs the videos")
    if args.load_embeddings and args.resume == AUTO:
        parser.error("--load_embeddings: --resume auto is for training; name the checkpoint")
    if args.save_embeddings and not (args.do_eval or args.do_plot):
        parser.error("--save_embeddings needs --do_eval 1 or --do_plot 1")
    if args.zero_shot and args.do_train:
        parser.error(
            "--zero_shot evaluates CLIP as it is, not --do_train 1, which logs its rows itself "
            "(--log_zero_shot)"
        )
    if args.zero_shot and (args.resume or args.load_from_pretrained):
        parser.error("--zero_shot evaluates CLIP as it is: it takes no checkpoint")
    model = args.resume not in (None, AUTO) or args.zero_shot
    if not (args.do_train or model or args.load_embeddings):
        task = "do_eval" if args.do_eval else "do_plot"
        parser.error(f"--{task} 1 needs --resume with the checkpoint to use, or --zero_shot")
    if args.resume not in (None, AUTO) and args.load_from_pretrained:
        parser.error("--resume resumes a run, --load_from_pretrained starts one: not both")
    for checkpoint in (args.resume, args.load_from_pretrained):
        if checkpoint not in (None, AUTO) and not checkpoint.is_file():
            parser.error(f"no such checkpoint: {checkpoint}")
    if args.save_predictions and not args.do_eval:
        parser.error("--save_predictions 1 needs --do_eval 1")
    if args.text_relations and not args.freeze_clip:
        parser.error("--text_relations compares with a frozen CLIP: give --freeze_clip 1")
    if args.temp_kernel_sz % 2 == 0:
        parser.error(f"--temp_kernel_sz must be odd: {args.temp_kernel_sz}")
    name = args.datatype + (f"_zero_shot_{args.zero_shot}" if args.zero_shot else "")
    if args.output_dir is None:
        args.output_dir = ROOT / "logs" / f"{args.subtask_type.lower()}_{name}"
    if args.plot_dir is None:
        args.plot_dir = ROOT / "VIS" / name
    return args


class _Help(argparse.HelpFormatter):
    """Every flag's default after its help, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, argparse.SUPPRESS, []):
            return action.help
        return f"{action.help} (default {str(action.default).removeprefix(f'{ROOT}/')})"


def checkpoint(text: str) -> Path | str:
    """The type of --resume."""
    return AUTO if text == AUTO else Path(text)


def build_parser() -> argparse.ArgumentParser:
    """All flags; `parse_args` checks how they combine."""
    parser = Parser(
        prog="main.py",
        description="Train and evaluate ProPy for partially relevant video retrieval, and for "
        "weakly supervised moment retrieval from a corpus of videos.",
        epilog="[published: …] is the setting behind the paper's numbers. "
        "scripts/prvr_<split>.sh and vcmr_<split>.sh hold them for each data set.",
        formatter_class=_Help,
    )
    switch = {"type": int, "choices": [0, 1]}
    # fmt: off
    add = parser.add_argument_group("what to do").add_argument
    add("--do_train", **switch, default=0, help="train, evaluating after every epoch")
    add("--do_eval", **switch, default=0,
        help="evaluate the checkpoint --resume; after training, its best checkpoint")
    add("--do_plot", **switch, default=0,
        help="draw what the checkpoint --resume attends to; after training, its best checkpoint")
    add("--subtask_type", choices=["PRVR", "VCMR"], default="PRVR",
        help="what is evaluated and chooses the best epoch: PRVR, videos, by SumR; VCMR, moments "
        "(and videos), by the sum of R@1, 10 and 100 at IoU 0.5 and 0.7")
    add("--datatype", choices=DATATYPES, default="custom",
        help="the data set: adds its published row to the results and checks the split's size; "
        "custom does neither")
    add("--resume", type=checkpoint, metavar="CKPT",
        help="checkpoint to evaluate, which may be one of the authors', or to resume training "
        "from; auto resumes --output_dir's ckpt.pth.tar, or starts if there is none")
    add("--zero_shot", choices=list(ZERO_SHOT),
        help="--do_eval and --do_plot without a checkpoint: CLIP's frame features alone, by their "
        "mean, by the best frame, or by the mean over each event, which scores moments too")
    add("--load_from_pretrained", type=Path, metavar="CKPT",
        help="start a new training from this checkpoint's weights, with a fresh optimizer")
    add("--output_dir", type=Path,
        help="folder for log.txt, log.jsonl, args.json, TensorBoard events and checkpoints "
        "(default logs/<subtask>_<datatype>, with _zero_shot_<scoring>)")

    add = parser.add_argument_group("data").add_argument
    add("--prvr_train_annos", type=Path, metavar="JSONL", help="training annotations")
    add("--prvr_val_annos", type=Path, metavar="JSONL", required=True,
        help="annotations of the split to evaluate")
    add("--video_dir", type=Path,
        help="folder of <vid_name>.mp4, prepared by scripts/prepare.sh (3 fps, short side 224)")
    add("--frame_store", type=Path, metavar="FILE",
        help="read the frames from this file of scripts/data/pack_frames.py instead of "
        "--video_dir: faster, and the same frames up to JPEG's loss")
    add("--max_words", type=number(int, 3), default=32,
        help="tokens of a caption, start and end included [published: 32; ActivityNet and "
        "QVHighlights 64]")
    add("--allow_missing", **switch, default=0,
        help="1 skips videos that are missing or have an unreadable header, and their queries: "
        "missing_videos.jsonl lists them, results name the reduced size; 0: they are an error")
    add("--num_thread_reader", type=number(int, 0, 1024), default=min(8, usable_cores()),
        metavar="N",
        help="processes that decode videos; results do not depend on it")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_clip_name", default="ViT-B/32", metavar="NAME|FILE",
        help="ViT-B/32, ViT-B/16, ViT-L/14, or open_clip's architecture/tag, as "
        "ViT-B-32/laion2b_s34b_b79k, fetched into CLIP_weights by scripts/download_clip.sh (--list "
        "names all); or a weights file in OpenAI's, open_clip's or transformers' format "
        "[published: ViT-B/32]")
    add("--clip_activation", choices=["quick_gelu", "gelu"],
        help="what CLIP's weights were trained with, for a file that does not say it: OpenAI's "
        "have quick_gelu, most of open_clip's gelu (default: what is known of the name or file, "
        "else quick_gelu, with a warning)")
    add("--freeze_clip", **switch, default=1,
        help="0 fine-tunes CLIP too, with lr·coef_lr [published: 1]")
    add("--pyr_config_path", type=Path, default=ROOT / "scripts/pyramids/cfg_32.json",
        help="the prompt pyramid [published: scripts/pyramids/cfg_32.json, 32 frames, 42 events]")
    add("--Nvp", type=number(int, 0), default=4, help="visual prompts per layer [published: 4]")
    add("--num_adapter_layers", type=number(int, 0), default=12,
        help="first so many layers with a temporal adapter [published: 12, all]")
    add("--adapter_channels", type=number(int, 1), default=384,
        help="width of an adapter [published: 384]")
    add("--temp_kernel_sz", type=number(int, 1), default=5,
        help="frames an adapter's convolution spans, odd [published: 5; Charades 3]")

    add("--visibility", choices=VISIBILITIES, default="relatives",
        help="which events an event attends to besides itself: ancestors and descendants, one of "
        "the two, all, or none (self) [published: relatives]")
    add("--text_prompts", choices=["projected", "none"], default="projected",
        help="of the text tower, projected from the visual ones [published: projected]")
    add("--lora_rank", type=number(int, 0), default=0, metavar="R",
        help="of a low-rank adaptation of both towers' queries, keys and values [published: 0, "
        "without]")
    add("--frame_groups", default="", metavar="SIZES",
        help="2,4: groups of 2, then of 4 neighbouring frames attend together in the last two "
        "blocks whose frames are used [published: none, each frame by itself]")
    add("--frame_embedding", **switch, default=0,
        help="1 adds a learned vector to the tokens of each frame [published: 0]")
    add("--readout", choices=list(READOUTS), default="max",
        help="a video's score in training, from its events' cosines: models/README.md#options "
        "explains it and the other options of the network and the loss [published: max]")
    add("--rank_readout", choices=list(READOUTS),
        help="its score when videos are ranked (default: consensus: half; annealed: max; else that "
        "of training)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=10, help="[published: 10]")
    add("--batch_size", type=number(int, 2), default=24,
        help="videos in a batch, each with all its captions; alone a video would have none to be "
        "told from [published: 24]")
    add("--lr", type=number(float, 1e-8, 1e3), default=8e-4,
        help="peak learning rate of the new parameters [published: TVR and Charades 8e-4, "
        "ActivityNet 1e-3, QVHighlights 9e-4]")
    add("--coef_lr", type=number(float, 0, 1e3), default=1e-3,
        help="factor on lr for CLIP's own parameters, only with --freeze_clip 0")
    add("--wd", type=number(float, 0, 1e3), default=0.2,
        help="weight decay of everything but biases [published: 0.2]")
    add("--hard_negatives", type=number(float, 0, 1e3), default=0.0, metavar="WEIGHT",
        help="of a hinge on each text's and video's hardest negative [published: 0, without]")
    add("--text_relations", type=number(float, 0, 1e3), default=0.0, metavar="WEIGHT",
        help="of keeping frozen CLIP's distances and angles among a batch's texts, with "
        "--freeze_clip 1 [published: 0]")
    add("--reversed_negatives", type=number(float, 0, 1e3), default=0.0, metavar="WEIGHT",
        help="of telling videos from themselves played backwards, 0.3 to start [published: 0]")
    add("--reversed_share", type=number(float, 1e-6, 1), default=0.5,
        help="of a step's videos that --reversed_negatives embeds backwards too")
    add("--clip_grad_norm", type=number(float, 1e-12), default=1.0,
        help="largest norm of the gradient, inf for no limit [published: 1.0]")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, metavar="K",
        help="compute each batch in K micro-batches, to need less memory: every text still meets "
        "all videos of the batch, so loss and gradient are those of K=1, for a third more work "
        "[published: 1]")
    add("--checkpoint_activations", **switch, default=0,
        help="1 keeps each layer's inputs only and computes the rest again for the gradient: less "
        "memory for the same numbers, and a third to a half more time [published: 0]")
    add("--compile", **switch, default=0,
        help="1 runs the encoders through torch.compile, which takes minutes at the start and "
        "needs a C++ compiler; results are equal up to rounding")
    add("--precision", choices=["amp", "bf16", "fp32"],
        help="of the training forward: amp (float16 autocast with loss scaling), bf16 or fp32; "
        "loss and evaluation are float32 always [published: amp] (default amp on a GPU, fp32 on a "
        "CPU)")
    add("--backend", choices=["nccl", "gloo"],
        help="how several processes, which torchrun starts, speak to each other (default nccl on "
        "GPUs, gloo on CPUs)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42,
        help="of initial values, shuffling and frame sampling [published: 42]")
    add("--log_zero_shot", **switch, default=1,
        help="1 evaluates CLIP alone on the validation split before the first epoch, the rows to "
        "beat in tables, log.jsonl, report and curves: one more pass over its videos; 0 does not")
    add("--save_every_steps", type=number(int, 0), default=0, metavar="N",
        help="save ckpt.pth.tar within an epoch too, every N steps; 0: no")

    add = parser.add_argument_group("evaluation").add_argument
    add("--batch_size_val", type=number(int, 1), default=16,
        help="videos encoded at a time [published: 16]")
    add("--event_scores", choices=["cosine", "dot", "both"], default="cosine",
        help="how texts and events are compared in PRVR: cosine, as the paper says; dot leaves the "
        "events' lengths in, as the authors' program does on ActivityNet; both reports both rows, "
        "cosine choosing the best epoch, dot another one, ckpt.best_dot.pth.tar")
    add("--npev", type=number(int, 1), default=10, metavar="N",
        help="VCMR: moments of one video that count, the best [published: 10]")
    add("--window_rule", choices=WINDOW_RULES, default="half",
        help="VCMR: of a query with several windows a prediction must reach half, rounded down "
        "but at least one, or any; the other rule is reported beside [published: half]")
    add("--save_embeddings", type=Path, metavar="HDF5",
        help="save the embeddings that --do_eval or --do_plot computes, with what they depend on, "
        "for --load_embeddings")
    add("--load_embeddings", type=Path, metavar="HDF5",
        help="--do_eval with saved embeddings: needs neither videos nor CLIP, and --resume only to "
        "be sure of the checkpoint; a file of other annotations, another pyramid, checkpoint, "
        "readout or max_words is refused")
    add("--save_predictions", **switch, default=0,
        help="save the predicted moments of --do_eval in the output folder: predictions.h5, for "
        "scripts/{report,score_predictions}.py, and TVR's and QVHighlights' submission formats")

    add = parser.add_argument_group("plotting").add_argument
    add("--plot_dir", type=Path, metavar="DIR",
        help="folder for the pictures and what they are drawn from (default VIS/<datatype>, "
        "with _zero_shot_<scoring>)")
    add("--plot_ids", nargs="+", default=[], metavar="DESC_ID",
        help="draw these queries (default: those whose right video is ranked first)")
    add("--plot_limit", type=number(int, 0), default=20, metavar="N",
        help="of the queries ranked first draw N, chosen by --seed; 0 draws all")
    add("--plot_layer", type=int, default=0, metavar="L",
        help="draw the attention of this layer, counted from 1; 0 is the last")
    add("--plot_head", type=int, default=0, metavar="H",
        help="save and draw the attention of this head, counted from 1; 0 is the mean of all")
    add("--plot_style", choices=PLOT_STYLES, default="readable",
        help="colours: readable for all eyes, or those of the authors' figures")
    add("--plot_format", choices=["png", "svg", "pdf"], default="png",
        help="of the overview; svg and pdf draw the pyramid's picture in that format too")
    # fmt: on
    return parser
