"""CLIP's loading and features against open_clip, an independent implementation."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch

from dataloaders.tokenizer import tokenize
from models import build_model
from models.clip import CLIP, CLIPSettings, CLIPSizes
from models.clip_weights import PUBLISHED_ARCHIVES, build_clip, read_weights, weights_path
from modules import ModelError
from tests.golden_model import GOLDEN, make_weights
from tests.models.server import serving

CAPTIONS = ["a man opens the door", "two dogs", "she pours 2 cups of water into the pot"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Small weights as OpenAI publishes them (half precision, TorchScript) and as a state dict."""
    folder = tmp_path_factory.mktemp("weights")
    plain, archive = make_weights.write("small224", 1, "fp16", str(folder))
    return {"plain": Path(plain), "archive": Path(archive)}


def reference(state: dict, sizes: CLIPSizes) -> torch.nn.Module:
    """open_clip's model of those sizes, with the same weights and OpenAI's activation."""
    vision = {
        "layers": sizes.vision_layers, "width": sizes.vision_width,
        "patch_size": sizes.patch_size, "image_size": sizes.input_resolution,
    }  # fmt: skip
    text = {
        "context_length": sizes.context_length, "vocab_size": sizes.vocab_size,
        "width": sizes.text_width, "heads": sizes.text_width // 64, "layers": sizes.text_layers,
    }  # fmt: skip
    model = open_clip.CLIP(sizes.embed_dim, vision, text, quick_gelu=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask"}
    return model.eval()


def compare(clip: CLIP, state: dict) -> None:
    theirs = reference(state, clip.sizes)
    side = clip.sizes.input_resolution
    images, token_ids = torch.randn(2, 3, side, side), tokenize(CAPTIONS, 32)
    padded = torch.nn.functional.pad(token_ids, (0, 77 - token_ids.shape[1]))
    near = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(images), theirs.encode_image(images), **near)
        torch.testing.assert_close(clip.encode_text(token_ids), theirs.encode_text(padded), **near)


@pytest.mark.parametrize(
    "kind", ["plain", "archive", pytest.param("published size", marks=pytest.mark.slow)]
)
def test_features_equal_open_clips(files, kind: str) -> None:
    if kind == "published size":
        state = make_weights.torch_state(make_weights.make("vitb32", 1))
        compare(build_clip(state), state)
    else:
        compare(build_clip(files[kind], trust_archive=True), read_weights(files["plain"])[0])


def test_archive_and_state_dict_hold_the_same(files) -> None:
    plain, archive = (read_weights(files[kind], True)[0] for kind in ("plain", "archive"))
    assert plain.keys() == archive.keys()
    assert all(torch.equal(plain[key], archive[key]) for key in plain)
    assert {value.dtype for value in archive.values()} == {torch.float32}
    assert build_clip(archive).sizes == CLIPSizes(64, 128, 4, 32, 7, 128, 4, 77, 49408, 512, 512)


def test_an_archive_is_loaded_if_published_or_trusted(files, monkeypatch, caplog) -> None:
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
    assert build_clip(files["archive"]).settings == CLIPSettings()
    assert loaded and not caplog.text
    with pytest.raises(ModelError, match="quick_gelu, not gelu"):
        build_clip(files["archive"], activation="gelu")


def test_the_published_archives_are_those_that_are_downloaded() -> None:
    script = (GOLDEN.parents[1] / "scripts/download_clip.sh").read_text()
    assert set(re.findall(r"sha256=([0-9a-f]{64})", script)) == PUBLISHED_ARCHIVES


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


@pytest.mark.parametrize("kind", ["plain", "archive"])
def test_a_cut_or_changed_file_is_named(files, tmp_path, kind: str) -> None:
    """A flipped bit anywhere in the weights too: torch itself does not look at the checksums."""
    content = bytearray(files[kind].read_bytes())
    for keep in (0, 1000, 100_000):
        (tmp_path / "cut.pt").write_bytes(content[:keep])
        with pytest.raises(ModelError, match=r"cut\.pt"):
            read_weights(tmp_path / "cut.pt", trust_archive=True)
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


@pytest.fixture
def download(tmp_path):
    """Run scripts/download_clip.sh against a local server, on a part that an earlier run left; its
    stand-in file has another sha256."""
    content = b"weights" * 5000
    script = (GOLDEN.parents[1] / "scripts/download_clip.sh").read_text()
    published = re.search(r"ViT-B/32\) sha256=(\w+)", script)[1]
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/download_clip.sh").write_text(script.replace(published, digest))
    (folder := tmp_path / "CLIP_weights").mkdir()

    def run(part: bytes | None = None, url: str | None = None) -> subprocess.CompletedProcess:
        if part is not None:
            (folder / "ViT-B-32.pt.part").write_bytes(part)
        return subprocess.run(
            ["bash", "scripts/download_clip.sh"], cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": "/usr/bin:/bin", "no_proxy": "127.0.0.1",
                 "base_url": url or run.server.url},
        )  # fmt: skip

    with serving() as run.server:
        run.server.files[f"/{digest}/ViT-B-32.pt"] = content
        run.folder, run.content = folder, content
        yield run


def test_download_is_checked_and_resumed(download) -> None:
    done = download(download.content[:12345])
    assert done.returncode == 0, done.stderr
    (target,) = download.folder.iterdir()
    assert target.name == "ViT-B-32.pt" and target.read_bytes() == download.content
    assert download.server.answers == ["206 from 12345"]
    assert "is right" in download().stdout


@pytest.mark.parametrize("longer", [b"", b"more"])
def test_a_wrong_part_that_cannot_be_resumed_is_replaced(download, longer) -> None:
    wrong = bytes(len(download.content)) + longer
    done = download(wrong)
    assert done.returncode == 0, done.stderr
    assert download.server.answers == [f"416 from {len(wrong)}", "200 from 0"]
    assert (download.folder / "ViT-B-32.pt").read_bytes() == download.content


SOURCES = ("base_url=", "ViT-B-32-quickgelu/openai", "openai/clip-vit-base-patch32")


@pytest.mark.parametrize(
    ("status", "elsewhere"), [(404, True), (403, True), (410, True), (503, False), (429, False)]
)
def test_a_part_outlives_a_server_that_fails(download, status: int, elsewhere: bool) -> None:
    """Where the file is gone for good, other sources are named."""
    download.server.files.clear()
    download.server.status = status
    done = download(download.content[:12345])
    assert done.returncode == 1 and f"HTTP {status}" in done.stderr
    assert "broke off" not in done.stderr
    assert [source in done.stderr for source in SOURCES] == 3 * [elsewhere]
    (part,) = download.folder.iterdir()
    assert part.read_bytes() == download.content[:12345]


def test_a_server_that_is_not_there_is_said(download) -> None:
    done = download(url="http://127.0.0.1:9")
    assert done.returncode == 1 and "cannot be reached" in done.stderr
    assert all(source in done.stderr for source in SOURCES)


def test_a_wrong_download_is_not_put_in_place(download) -> None:
    (address,) = download.server.files
    download.server.files[address] = download.content[:-1] + b"!"
    done = download()
    assert done.returncode == 1 and "not the published file" in done.stderr
    assert not list(download.folder.iterdir())
