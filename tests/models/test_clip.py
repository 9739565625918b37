"""CLIP's loading and features against open_clip, an independent implementation."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch

from dataloaders.tokenizer import tokenize
from models import build_model
from models.clip import CLIP, CLIPSizes
from models.clip_weights import PUBLISHED_ARCHIVES, build_clip, read_weights, weights_path
from modules import ModelError
from modules.transformer import GELU, QUICK_GELU
from tests.golden_model import GOLDEN, make_weights

CAPTIONS = ["a man opens the door", "two dogs", "she pours 2 cups of water into the pot"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Small weights as OpenAI publishes them (half precision, TorchScript) and as a state dict."""
    folder = tmp_path_factory.mktemp("weights")
    plain, archive = make_weights.write("small224", 1, "fp16", str(folder))
    state = torch.load(plain, weights_only=True)
    safetensors.torch.save_file(dict(state), folder / "s.safetensors")
    return {
        "plain": Path(plain), "archive": Path(archive), "safetensors": folder / "s.safetensors"
    }  # fmt: skip


def reference(state: dict, sizes: CLIPSizes, activation: str) -> torch.nn.Module:
    """open_clip's model of those sizes, with the same weights."""
    model = open_clip.CLIP(
        embed_dim=sizes.embed_dim,
        vision_cfg={
            "layers": sizes.vision_layers,
            "width": sizes.vision_width,
            "patch_size": sizes.patch_size,
            "image_size": sizes.input_resolution,
        },
        text_cfg={
            "context_length": sizes.context_length,
            "vocab_size": sizes.vocab_size,
            "width": sizes.text_width,
            "heads": sizes.text_width // 64,
            "layers": sizes.text_layers,
        },
        quick_gelu=activation == QUICK_GELU,
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask"}
    return model.eval()


def features(clip: torch.nn.Module, side: int, images: str, texts: str) -> list[torch.Tensor]:
    """Of fixed inputs, both towers'."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, side, side, generator=generator)
    token_ids = tokenize(CAPTIONS, 32)
    token_ids = torch.nn.functional.pad(token_ids, (0, 77 - token_ids.shape[1]))
    with torch.no_grad():
        return [getattr(clip, images)(pixels), getattr(clip, texts)(token_ids)]


def compare(clip: CLIP, state: dict) -> None:
    theirs = reference(state, clip.sizes, clip.activation)
    names = ("encode_image", "encode_text")
    side = clip.sizes.input_resolution
    expected = features(theirs, side, *names)
    torch.testing.assert_close(features(clip, side, *names), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "archive"])
def test_features_equal_open_clips(files, kind: str) -> None:
    compare(build_clip(files[kind], trust_archive=True), read_weights(files["plain"]).state)


@pytest.mark.parametrize("activation", [QUICK_GELU, GELU])
def test_both_activations_are_open_clips(activation: str) -> None:
    state = make_weights.torch_state(make_weights.make("tiny", 1))
    compare(build_clip(state, activation=activation), state)


def transformers_state(state: dict) -> dict:
    """OpenAI's tensors under the names and in the shapes of transformers' CLIPModel, written down
    a second time and the other way round."""
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight",
    }
    parts = [
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("ln_final.", "text_model.final_layer_norm."),
        (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.", ".self_attn."),
        (".c_fc.", ".fc1."), (".c_proj.", ".fc2."),
    ]  # fmt: skip
    theirs = {}
    for name, tensor in state.items():
        key = names.get(name, name)
        if key.endswith("projection.weight"):
            tensor = tensor.T.contiguous()
        if key == name:
            for ours, other in parts:
                key = key.replace(ours, other)
        if ".in_proj_" in key:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                theirs[key.replace("in_proj_", f"{letter}_proj.")] = rows.clone()
        else:
            theirs[key] = tensor.clone()
    return theirs


def write_each_format(folder: Path) -> tuple[dict, dict[str, Path]]:
    """The same small weights in every format: OpenAI's tensors, and files by what they are."""
    state = make_weights.torch_state(make_weights.make("tiny", 1))
    theirs = transformers_state(state)
    contents = {
        "plain.pt": state,
        "wrapped.pt": {"epoch": 3, "name": "x", "state_dict": state},
        "parallel.pt": {"state_dict": {f"module.{name}": t for name, t in state.items()}},
        "lightning.ckpt": {"state_dict": {f"model.clip.{name}": t for name, t in state.items()}},
        "named_so.bin": {"model": state | {"attn_mask": torch.zeros(77, 77)}},
        "pytorch_model.bin": theirs
        | {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)},
        "transformers_wrapped.pt": {"state_dict": {f"module.{n}": t for n, t in theirs.items()}},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    safetensors.torch.save_file(theirs, folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "any_name")
    return state, {path.name: path for path in sorted(folder.iterdir())}


def test_every_format_gives_the_same_features(tmp_path) -> None:
    state, paths = write_each_format(tmp_path)
    assert len(paths) == 10
    names = ("encode_image", "encode_text")
    expected = features(build_clip(state), 64, *names)
    for path in paths.values():
        clip = build_clip(path)
        assert clip.sizes == CLIPSizes.of_state_dict(state), path
        torch.testing.assert_close(features(clip, 64, *names), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", [QUICK_GELU, GELU])
def test_features_equal_transformers(tmp_path, activation: str, caplog) -> None:
    """From the files that its own program writes; config.json beside them says the activation."""
    transformers = pytest.importorskip("transformers")
    state = make_weights.torch_state(make_weights.make("tiny", 2))
    layers = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 512,
              "num_attention_heads": 2, "hidden_act": activation}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=layers | {"vocab_size": 49408},
        vision_config=layers | {"image_size": 64, "patch_size": 32},
        projection_dim=64,
    )
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(transformers_state(state), strict=True)
    model.save_pretrained(tmp_path)
    clip = build_clip(tmp_path / "model.safetensors")
    assert clip.activation == activation and not caplog.text
    images, texts = features(model, 64, "get_image_features", "get_text_features")
    expected = [getattr(output, "pooler_output", output) for output in (images, texts)]
    ours = features(clip, 64, "encode_image", "encode_text")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def configure(
    folder: Path, transformers: dict | None = None, open_clip: dict | None = None
) -> None:
    """What the hubs publish beside weights."""
    if transformers is not None:
        part = {"hidden_size": 128, "num_attention_heads": 2} | transformers
        config = {"model_type": "clip", "text_config": part, "vision_config": part}
        (folder / "config.json").write_text(json.dumps(config))
    if open_clip is not None:
        config = {"vision_cfg": {"width": 128}, "text_cfg": {"width": 128, "heads": 2}} | open_clip
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def test_the_activation_is_found_named_or_warned_of(tmp_path, files, monkeypatch, caplog) -> None:
    _, paths = write_each_format(tmp_path)
    theirs, plain = paths["model.safetensors"], paths["open_clip_model.safetensors"]
    for path in (theirs, plain):
        assert build_clip(path).activation == QUICK_GELU
        assert f"{path}: nothing says which activation" in caplog.text
        caplog.clear()
        assert build_clip(path, activation=GELU).activation == GELU
    for said in (QUICK_GELU, GELU):
        other = {QUICK_GELU: GELU, GELU: QUICK_GELU}[said]
        configure(tmp_path, {"hidden_act": said}, {"quick_gelu": said == QUICK_GELU})
        for path in (theirs, plain):
            assert build_clip(path).activation == build_clip(path, activation=said).activation
            assert build_clip(path).activation == said
            with pytest.raises(ModelError, match=rf"{path.name}: .*{said}, not {other}"):
                build_clip(path, activation=other)
    configure(tmp_path, {}, {})  # what each program takes where nothing is said
    assert build_clip(theirs).activation == QUICK_GELU and build_clip(plain).activation == GELU
    sha256 = hashlib.sha256(files["archive"].read_bytes()).hexdigest()
    monkeypatch.setattr("models.clip_weights.PUBLISHED_ARCHIVES", {sha256})
    assert build_clip(files["archive"]).activation == QUICK_GELU
    with pytest.raises(ModelError, match="quick_gelu, not gelu"):
        build_clip(files["archive"], activation=GELU)
    assert not caplog.text


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (({"hidden_act": "gelu_new"}, None), r"config\.json: .*gelu_new"),
        (({"num_attention_heads": 4}, None), r"config\.json: 64 channels"),
        (
            (None, {"vision_cfg": {"width": 128, "head_width": 32}}),
            r"open_clip_config.*64 channels",
        ),
        ((None, {"text_cfg": {"width": 128, "heads": 4}}), r"open_clip_config.*64 channels"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, configs, message) -> None:
    _, paths = write_each_format(tmp_path)
    configure(tmp_path, *configs)
    name = "model.safetensors" if configs[0] else "plain.pt"
    with pytest.raises(ModelError, match=message):
        build_clip(paths[name])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_cfg": 3}', '{"vision_config": {}}'])
def test_a_configuration_of_something_else_says_nothing(tmp_path, text, caplog) -> None:
    _, paths = write_each_format(tmp_path)
    for name, weights in (
        ("config.json", "model.safetensors"),
        ("open_clip_config.json", "plain.pt"),
    ):
        (tmp_path / name).write_text(text)
        assert build_clip(paths[weights]).activation == QUICK_GELU
        assert str(tmp_path / name) in caplog.text and "nothing says which" in caplog.text


LAYER = "vision_model.encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{LAYER}.k_proj.bias"), f"(?s)in_proj_bias.*{LAYER}.q_proj.bias"),
        (lambda s: s.update({f"{LAYER}.x_proj.bias": torch.zeros(128)}), f"{LAYER}.x_proj.bias"),
        (lambda s: s.update({"visual.proj": torch.zeros(128, 64)}), "visual_projection.weight"),
        (lambda s: s.update({"vision_model.head.weight": torch.zeros(1)}), "vision_model.head"),
        (lambda s: s.pop("text_projection.weight"), "text_projection"),
        (lambda s: s.update({f"{LAYER}.q_proj.bias": torch.zeros(64)}), "in_proj_bias"),
        (lambda s: s.update({"logit_bias": torch.zeros(1)}), "logit_bias"),
    ],
)
def test_every_tensor_of_transformers_is_accounted_for(tmp_path, change, message) -> None:
    theirs = transformers_state(make_weights.torch_state(make_weights.make("tiny", 1)))
    change(theirs)
    safetensors.torch.save_file(theirs, tmp_path / "changed.safetensors")
    with pytest.raises(
        ModelError, match=rf"changed\.safetensors: {message}" if 0 else message
    ) as e:
        build_clip(tmp_path / "changed.safetensors")
    assert "changed.safetensors" in str(e.value)


@pytest.mark.slow
def test_features_equal_open_clips_at_the_published_size() -> None:
    state = make_weights.torch_state(make_weights.make("vitb32", 1))
    compare(build_clip(state), state)


def test_archive_and_state_dict_hold_the_same(files) -> None:
    plain, archive = (read_weights(files[kind], True).state for kind in ("plain", "archive"))
    assert plain.keys() == archive.keys()
    assert all(torch.equal(plain[key], archive[key]) for key in plain)
    assert {value.dtype for value in archive.values()} == {torch.float32}


def test_an_archive_is_loaded_if_published_or_trusted(files, monkeypatch) -> None:
    """Loading one runs its code, so nothing of it may be touched before."""
    loaded = []
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: loaded.append(1) or load(*a, **k))
    with pytest.raises(ModelError, match=r"s1-fp16\.jit\.pt: .*TRUST_CLIP_ARCHIVE=1"):
        read_weights(files["archive"])
    assert not loaded
    read_weights(files["archive"], trust_archive=True)
    assert loaded.pop()
    sha256 = hashlib.sha256(files["archive"].read_bytes()).hexdigest()
    monkeypatch.setattr("models.clip_weights.PUBLISHED_ARCHIVES", {sha256})
    read_weights(files["archive"])
    assert loaded


def test_the_published_archives_are_those_that_are_downloaded() -> None:
    script = (GOLDEN.parents[1] / "scripts/download_clip.sh").read_text()
    assert set(re.findall(r"sha256=([0-9a-f]{64})", script)) == PUBLISHED_ARCHIVES


def test_sizes_are_read_off_the_tensors(files) -> None:
    assert build_clip(files["archive"], trust_archive=True).sizes == CLIPSizes(
        64, 128, 4, 32, 7, 128, 4, 77, 49408
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln_final.weight"), r"ln_final\.weight"),
        (lambda s: s.pop("visual.conv1.weight"), "visual.conv1.weight.*not the weights of a CLIP"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"visual.proj": torch.zeros(128, 65)}), "visual.proj"),
        (
            lambda s: s["visual.proj"][3].fill_(float("nan")),
            "'visual.proj' has values that are not",
        ),
        (lambda s: s.update({"visual.proj": s["visual.proj"].to_sparse()}), "not a plain tensor"),
        (lambda s: s.update({"visual.proj": torch.zeros(1).expand(2**45)}), "not a plain tensor"),
    ],
)
def test_every_key_and_shape_is_accounted_for(files, tmp_path, change, message: str) -> None:
    state = torch.load(files["plain"], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(ModelError, match=message) as error:
        build_clip(tmp_path / "changed.pt")
    assert "changed.pt" in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 1000, 100_000])
@pytest.mark.parametrize("kind", ["plain", "archive", "safetensors"])
def test_a_cut_file_is_named(files, tmp_path, kind: str, keep: int) -> None:
    (tmp_path / "cut.pt").write_bytes(files[kind].read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cut\.pt"):
        read_weights(tmp_path / "cut.pt", trust_archive=True)


@pytest.mark.parametrize("kind", ["plain", "archive"])
def test_a_flipped_bit_is_found(files, tmp_path, kind: str) -> None:
    """Anywhere in the weights: torch itself does not look at the checksums."""
    content = bytearray(files[kind].read_bytes())
    values = torch.load(files["plain"], weights_only=True)["visual.proj"].numpy().tobytes()
    content[content.index(values) + len(values) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"flipped\.pt: .*checksum"):
        read_weights(tmp_path / "flipped.pt", trust_archive=True)


def test_more_text_than_visual_layers_are_refused_by_name(files, tmp_path) -> None:
    state = torch.load(files["plain"], weights_only=True)
    layer = {k: v for k, v in state.items() if k.startswith("transformer.resblocks.3.")}
    state |= {key.replace(".3.", ".4."): value for key, value in layer.items()}
    torch.save(state, tmp_path / "tall.pt")
    with pytest.raises(ModelError, match=r"tall\.pt: .*5 text layers, but only 4 visual"):
        build_model(tmp_path / "tall.pt", {"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]})


def test_models_have_openais_names(tmp_path) -> None:
    assert weights_path("ViT-L/14", tmp_path) == tmp_path / "ViT-L-14.pt"
    assert weights_path("somewhere/else.pt", tmp_path) == Path("somewhere/else.pt")


def test_initialised_model_is_trainable() -> None:
    torch.manual_seed(0)
    clip = CLIP(CLIPSizes(64, 128, 2, 16, 2, 64, 2, 77, 49408))
    clip.initialize()
    features = clip.encode_image(torch.randn(4, 3, 32, 32))
    assert features.isfinite().all() and features.std(dim=0).min() > 1e-3
    assert all(p.isfinite().all() for p in clip.parameters())


class _Server(http.server.SimpleHTTPRequestHandler):
    """A folder over HTTP that honours Range, as OpenAI's server does."""

    ranges: list[str]
    status: int = 0  # answer with this error

    def do_GET(self) -> None:
        if self.status:
            self.send_error(self.status)
            return
        body = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers.get("Range")
        if wanted:
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def download(tmp_path):
    """Run scripts/download_clip.sh against a local server; its stand-in file has another sha256."""
    script = (GOLDEN.parents[1] / "scripts/download_clip.sh").read_text()
    content = b"weights" * 5000
    digest = hashlib.sha256(content).hexdigest()
    published = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert published in script
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/download_clip.sh").write_text(script.replace(published, digest))
    served = tmp_path / "served" / digest
    served.mkdir(parents=True)
    (served / "ViT-B-32.pt").write_bytes(content)

    handler = type("Handler", (_Server,), {"ranges": []})
    root = str(tmp_path / "served")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=root)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(**variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "scripts/download_clip.sh"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "no_proxy": "127.0.0.1",
                 "base_url": f"http://127.0.0.1:{server.server_address[1]}", **variables},
            capture_output=True,
            text=True,
        )  # fmt: skip

    run.handler = handler
    run.folder, run.content, run.served, run.ranges = (
        tmp_path / "CLIP_weights", content, served / "ViT-B-32.pt", handler.ranges
    )  # fmt: skip
    yield run
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_resumed(download) -> None:
    target = download.folder / "ViT-B-32.pt"
    download.folder.mkdir()
    part = download.folder / "ViT-B-32.pt.part"
    part.write_bytes(download.content[:12345])
    done = download()
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == download.content and not part.exists()
    assert download.ranges == ["bytes=12345-"], "it was not resumed"
    assert "is right" in download().stdout


@pytest.mark.parametrize("longer", [b"", b"more"])
def test_a_wrong_part_that_cannot_be_resumed_is_replaced(download, longer) -> None:
    download.folder.mkdir()
    wrong = bytes(len(download.content)) + longer
    (download.folder / "ViT-B-32.pt.part").write_bytes(wrong)
    done = download()
    assert done.returncode == 0, done.stderr
    assert download.ranges == [f"bytes={len(wrong)}-"], "curl did not ask"
    assert (download.folder / "ViT-B-32.pt").read_bytes() == download.content


def test_a_part_outlives_a_server_that_fails(download) -> None:
    download.folder.mkdir()
    part = download.folder / "ViT-B-32.pt.part"
    part.write_bytes(download.content[:12345])
    download.served.unlink()
    done = download()
    assert done.returncode == 1 and "broke off; run the same command to resume" in done.stderr
    assert part.read_bytes() == download.content[:12345]


def test_a_wrong_download_is_not_put_in_place(download) -> None:
    download.served.write_bytes(download.content[:-1] + b"!")
    done = download()
    assert done.returncode == 1 and "not the published file" in done.stderr
    assert not list(download.folder.iterdir())


@pytest.mark.parametrize(("status", "elsewhere"), [(404, True), (403, True), (410, True),
                                                   (503, False), (429, False)])  # fmt: skip
def test_an_error_of_the_server_is_no_download_that_broke_off(
    download, status: int, elsewhere: bool
) -> None:
    """What was there stays; where the file is gone for good, other sources are named."""
    download.folder.mkdir()
    part = download.folder / "ViT-B-32.pt.part"
    part.write_bytes(download.content[:12345])
    download.handler.status = status
    done = download()
    assert done.returncode == 1 and f"HTTP {status}" in done.stderr
    assert "broke off" not in done.stderr
    sources = ("base_url=", "timm/vit_base_patch32_clip_224.openai", "openai/clip-vit-base-patch32")
    assert [source in done.stderr for source in sources] == 3 * [elsewhere]
    assert part.read_bytes() == download.content[:12345]


def test_a_server_that_is_not_there_is_said(download) -> None:
    done = download(base_url="http://127.0.0.1:9")
    assert (
        done.returncode == 1 and "cannot be reached" in done.stderr and "base_url=" in done.stderr
    )
