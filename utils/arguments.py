"""The flags of main.py: names, published values, and the combinations that make no sense.

A flag is added with its reader in main.py and removed with it; everything else takes plain values.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from utils.evaluation.moment_metrics import WINDOW_RULES
from utils.evaluation.published import DATATYPES
from utils.misc import usable_cores
from utils.pictures.draw import STYLES
from utils.training.optim import MIN_LEARNING_RATE

ROOT = Path(__file__).resolve().parent.parent
AUTO = Path("auto")  # --resume: the output folder's own checkpoint

# The lowest and the highest value of a flag, both of them allowed.
RANGES = {
    "epochs": (1, math.inf), "batch_size": (1, math.inf), "batch_size_val": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf), "n_display": (1, math.inf),
    "save_every_steps": (0, math.inf), "profile": (0, math.inf), "num_thread_reader": (0, 1024),
    "max_words": (3, math.inf),  # start, a word, end
    "Nvp": (0, math.inf), "num_adapter_layers": (0, math.inf), "adapter_channels": (1, math.inf),
    "temp_kernel_sz": (1, math.inf), "seed": (0, 2**32 - 1),
    "lr": (MIN_LEARNING_RATE, 1e3), "coef_lr": (0, 1e3), "wd": (0, 1e3),
    "warmup_proportion": (0, 1), "clip_grad_norm": (1e-12, math.inf),  # inf: no clipping
    "npev": (1, math.inf), "max_event_per_text": (1, math.inf), "eval_memory_gib": (1e-6, 1e6),
    "plot_limit": (0, math.inf),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """All flags, with their published values."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate ProPy for partially relevant video retrieval, and for "
        "weakly supervised moment retrieval from a corpus of videos.",
        epilog="[published: …] is the setting behind the paper's numbers. "
        "scripts/prvr_<split>.sh and vcmr_<split>.sh hold them for each data set.",
    )
    # fmt: off
    add = parser.add_argument_group("what to do").add_argument
    add("--do_train", type=int, choices=[0, 1], default=0,
        help="train, evaluating after every epoch (default 0)")
    add("--do_eval", type=int, choices=[0, 1], default=0,
        help="evaluate the checkpoint --resume; after training, its best checkpoint (default 0)")
    add("--do_plot", type=int, choices=[0, 1], default=0,
        help="draw what the checkpoint --resume attends to; after training, its best checkpoint "
        "(default 0)")
    add("--subtask_type", choices=["PRVR", "VCMR"], default="PRVR",
        help="what is evaluated and chooses the best epoch: PRVR, videos, by SumR; VCMR, moments "
        "(and videos), by the sum of R@1, 10 and 100 at IoU 0.5 and 0.7 (default PRVR)")
    add("--datatype", choices=DATATYPES, default="custom",
        help="the data set: adds its published row to the results and checks the split's size "
        "(default custom: neither)")
    add("--resume", type=Path, metavar="CKPT",
        help="checkpoint to evaluate, or whose training is to go on; may be one of the authors' "
        "for evaluation; auto goes on with --output_dir's ckpt.pth.tar, or starts if there is none")
    add("--load_from_pretrained", type=Path, metavar="CKPT",
        help="start a new training from this checkpoint's weights, with a fresh optimizer")
    add("--output_dir", type=Path,
        help="folder for log.txt, log.jsonl, args.json, TensorBoard events and checkpoints "
        "(default logs/<subtask>_<datatype>)")

    add = parser.add_argument_group("data").add_argument
    add("--prvr_train_annos", type=Path, metavar="JSONL", help="training annotations")
    add("--prvr_val_annos", type=Path, metavar="JSONL", required=True,
        help="annotations of the split to evaluate")
    add("--video_dir", type=Path,
        help="folder of <vid_name>.mp4, prepared by scripts/prepare.sh (3 fps, short side 224)")
    add("--frame_store", type=Path, metavar="FILE",
        help="read the frames from this file, made of such a folder by "
        "scripts/data/pack_frames.py, instead of --video_dir: faster, and the same frames up to "
        "JPEG's loss")
    add("--gpu_decode", type=int, choices=[0, 1], default=0,
        help="1: the GPU decodes what --frame_store holds, instead of the processes that read it "
        "(default 0)")
    add("--max_words", type=int, default=32,
        help="tokens of a caption, start and end included [published: 32; ActivityNet and "
        "QVHighlights 64] (default 32)")
    add("--skip_check", type=int, choices=[0, 1], default=0,
        help="1 leaves out the look at every video's header before the run; only whether the files "
        "are there is checked then (default 0)")
    add("--allow_missing", type=int, choices=[0, 1], default=0,
        help="1 goes on without videos that are missing or unreadable, and without their queries: "
        "missing_videos.jsonl in the output folder lists them, results name the reduced size "
        "(default 0: an error)")
    add("--num_thread_reader", type=int, default=min(8, usable_cores()), metavar="N",
        help="processes that decode videos (default: one a CPU core, at most 8); results do not "
        "depend on it")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_clip_name", default="ViT-B/32", metavar="NAME|FILE",
        help="ViT-B/32, ViT-B/16, ViT-L/14, or a weights file in OpenAI's format "
        "[published: ViT-B/32] (default ViT-B/32)")
    add("--pretrained_dir", type=Path, default=ROOT / "CLIP_weights",
        help="folder of OpenAI's weights, fetched by scripts/download_clip.sh "
        "(default CLIP_weights)")
    add("--trust_clip_archive", type=int, choices=[0, 1], default=0,
        help="1 loads a TorchScript archive of CLIP's weights that is none of the files OpenAI "
        "publishes, which runs code that is in it (default 0)")
    add("--freeze_clip", type=int, choices=[0, 1], default=1,
        help="0 fine-tunes CLIP too, with lr·coef_lr [published: 1] (default 1)")
    add("--pyr_config_path", type=Path, default=ROOT / "scripts/pyramids/cfg_32.json",
        help="the prompt pyramid [published: scripts/pyramids/cfg_32.json, 32 frames, 42 events] "
        "(default that)")
    add("--Nvp", type=int, default=4, help="visual prompts per layer [published: 4] (default 4)")
    add("--num_adapter_layers", type=int, default=12,
        help="first so many layers with a temporal adapter [published: 12, all] (default 12)")
    add("--adapter_channels", type=int, default=384,
        help="width of an adapter [published: 384] (default 384)")
    add("--temp_kernel_sz", type=int, default=5,
        help="frames an adapter's convolution spans, odd [published: 5; Charades 3] (default 5)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="[published: 10] (default 10)")
    add("--batch_size", type=int, default=24,
        help="videos in a batch, each with all its captions [published: 24] (default 24)")
    add("--lr", type=float, default=8e-4,
        help="peak learning rate of the new parameters [published: TVR and Charades 8e-4, "
        "ActivityNet 1e-3, QVHighlights 9e-4] (default 8e-4)")
    add("--coef_lr", type=float, default=1e-3,
        help="factor on lr for CLIP's own parameters, only with --freeze_clip 0 (default 1e-3)")
    add("--wd", type=float, default=0.2,
        help="weight decay of everything but biases [published: 0.2] (default 0.2)")
    add("--warmup_proportion", type=float, default=0.1,
        help="share of the steps in the linear warm-up [published: 0.1] (default 0.1)")
    add("--clip_grad_norm", type=float, default=1.0,
        help="largest norm of the gradient, inf for no limit [published: 1.0] (default 1.0)")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="K",
        help="compute each batch in K parts, to need less memory. For a contrastive loss adding "
        "up small batches would be another loss, with fewer negatives; here every text still "
        "meets all videos of the batch, so loss and gradient are those of K=1, for a third more "
        "work [published: 1] (default 1)")
    add("--checkpoint_activations", type=int, choices=[0, 1], default=0,
        help="1 keeps each layer's inputs only and computes the rest again for the gradient: less "
        "memory for the same numbers, and a third to a half more time [published: 0] (default 0)")
    add("--compile", type=int, choices=[0, 1], default=0,
        help="1 runs the encoders through torch.compile, which takes minutes at the start and "
        "needs a C++ compiler; results are equal up to rounding (default 0)")
    add("--profile", type=int, default=0, metavar="N",
        help="trace N training steps, after a few to warm up, into <output_dir>/profile for "
        "https://ui.perfetto.dev or chrome://tracing (default 0: none)")
    add("--precision", choices=["amp", "bf16", "fp32"],
        help="of the training forward: amp (float16 autocast with loss scaling), bf16 (bfloat16 "
        "autocast) or fp32; loss and evaluation are float32 always [published: amp] "
        "(default: amp on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=42,
        help="of initial values, shuffling and frame sampling [published: 42] (default 42)")
    add("--n_display", type=int, default=50, help="log a line every so many steps (default 50)")
    add("--save_every_steps", type=int, default=0, metavar="N",
        help="save ckpt.pth.tar every N steps of an epoch too, not only after its training and "
        "after its evaluation (default 0: no)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--batch_size_val", type=int, default=16,
        help="videos encoded at a time [published: 16] (default 16)")
    add("--event_scores", choices=["cosine", "dot", "both"], default="cosine",
        help="how texts and events are compared: cosine, as the paper says; dot leaves the "
        "events' lengths in, as the authors' program does when it evaluates PRVR on ActivityNet; "
        "both reports both rows, cosine choosing the best epoch; moments are always ranked by "
        "cosine (default cosine)")
    add("--npev", type=int, default=10, metavar="N",
        help="VCMR: moments of one video that count, the best [published: 10] (default 10)")
    add("--max_event_per_text", type=int, default=1000, metavar="N",
        help="VCMR: moments of a text that count, the best; the metrics read the first 100 "
        "[published: 1000] (default 1000)")
    add("--window_rule", choices=WINDOW_RULES, default="half",
        help="VCMR: of a query with several windows a prediction must reach half, rounded down "
        "but at least one, or any; the other rule is reported beside [published: half] "
        "(default half)")
    add("--eval_memory_gib", type=float, default=1.0, metavar="GIB",
        help="memory for the scores of texts with videos, beside the embeddings, their normalised "
        "copy and the predictions; results do not depend on it (default 1)")
    add("--save_embeddings", type=Path, metavar="HDF5",
        help="keep the embeddings that --do_eval or --do_plot computes, with what they depend on, "
        "for --load_embeddings")
    add("--load_embeddings", type=Path, metavar="HDF5",
        help="--do_eval with kept embeddings instead of computing them: needs neither videos nor "
        "CLIP, and --resume only to be sure that they are of that checkpoint; a file of other "
        "annotations, another pyramid, checkpoint or max_words is refused")
    add("--save_predictions", type=int, choices=[0, 1], default=0,
        help="--do_eval leaves the predicted moments in the output folder: predictions.h5, "
        "for scripts/report.py and python -m scripts.score_predictions, and in TVR's and "
        "QVHighlights' submission formats (default 0)")

    add = parser.add_argument_group("plotting").add_argument
    add("--plot_dir", type=Path, metavar="DIR",
        help="folder for the pictures and what they are drawn from (default VIS/<datatype>)")
    add("--plot_ids", nargs="+", default=[], metavar="DESC_ID",
        help="draw these queries (default: those whose right video is ranked first)")
    add("--plot_limit", type=int, default=20, metavar="N",
        help="of the queries ranked first draw N, chosen by --seed; 0 draws all (default 20)")
    add("--plot_layer", type=int, default=0, metavar="L",
        help="draw the attention of this layer, counted from 1; 0 is the last (default 0)")
    add("--plot_head", type=int, default=0, metavar="H",
        help="save and draw the attention of this head, counted from 1; 0 is the mean of all "
        "(default 0)")
    add("--plot_style", choices=list(STYLES), default="readable",
        help="colours: readable for all eyes, or those of the authors' figures, jet, red and "
        "orange (default readable)")
    add("--plot_format", choices=["png", "svg", "pdf"], default="png",
        help="of the overview; svg and pdf draw the pyramid's picture in that format too "
        "(default png)")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; an impossible combination ends the program with a message."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.do_train or args.do_eval or args.do_plot):
        parser.error("nothing to do: give --do_train 1, --do_eval 1, --do_plot 1 or several")
    if not args.load_embeddings and bool(args.video_dir) == bool(args.frame_store):
        parser.error("give one of --video_dir and --frame_store: where the clips are")
    if args.gpu_decode and not args.frame_store:
        parser.error("--gpu_decode 1 needs --frame_store: a GPU decodes JPEGs, not videos")
    if args.do_train and not args.prvr_train_annos:
        parser.error("--do_train 1 needs --prvr_train_annos")
    if args.load_embeddings and (args.do_train or args.do_plot or args.save_embeddings):
        parser.error(
            "--load_embeddings is for --do_eval 1 alone: training, pictures and "
            "--save_embeddings need the model and the videos"
        )
    if args.load_embeddings and args.resume == AUTO:
        parser.error("--load_embeddings: --resume auto is for training; name the checkpoint")
    if args.save_embeddings and not (args.do_eval or args.do_plot):
        parser.error("--save_embeddings needs --do_eval 1 or --do_plot 1")
    if args.save_embeddings and not args.save_embeddings.parent.is_dir():
        parser.error(f"--save_embeddings: no such folder: {args.save_embeddings.parent}")
    for task in ("do_eval", "do_plot"):
        known = args.do_train or args.resume not in (None, AUTO) or args.load_embeddings
        if getattr(args, task) and not known:
            parser.error(f"--{task} 1 needs --resume with the checkpoint to use")
    if args.resume not in (None, AUTO) and args.load_from_pretrained:
        parser.error("--resume goes on with a run, --load_from_pretrained starts one: not both")
    for checkpoint in filter(None, (args.resume, args.load_from_pretrained)):
        if checkpoint != AUTO and not checkpoint.is_file():
            parser.error(f"no such checkpoint: {checkpoint}")
    if args.save_predictions and not args.do_eval:
        parser.error("--save_predictions 1 needs --do_eval 1")
    for name, (lowest, highest) in RANGES.items():
        if not lowest <= getattr(args, name) <= highest:  # NaN is not either
            wanted = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
            parser.error(f"--{name} must be {wanted}: {getattr(args, name)}")
    if args.temp_kernel_sz % 2 == 0:
        parser.error(f"--temp_kernel_sz must be odd: {args.temp_kernel_sz}")
    if args.output_dir is None:
        args.output_dir = ROOT / "logs" / f"{args.subtask_type.lower()}_{args.datatype}"
    if args.plot_dir is None:
        args.plot_dir = ROOT / "VIS" / args.datatype
    return args
