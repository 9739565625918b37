"""CLIP's loading and features against open_clip, an independent implementation."""

from __future__ import annotations

import hashlib
import http.server
import re
import subprocess
import threading
from pathlib import Path

import open_clip
import pytest
import torch

from dataloaders.tokenizer import tokenize
from models import build_model
from models.clip import CLIP, CLIPSizes
from models.clip_weights import PUBLISHED_ARCHIVES, build_clip, read_weights, weights_path
from modules import ModelError
from tests.golden_model import GOLDEN, make_weights

CAPTIONS = ["a man opens the door", "two dogs", "she pours 2 cups of water into the pot"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Small weights as OpenAI publishes them (half precision, TorchScript) and as a state dict."""
    folder = tmp_path_factory.mktemp("weights")
    plain, archive = make_weights.write("small224", 1, "fp16", str(folder))
    return {"plain": Path(plain), "archive": Path(archive)}


def reference(state: dict, sizes: CLIPSizes) -> torch.nn.Module:
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
        quick_gelu=True,
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask"}
    return model.eval()


def compare(clip: CLIP, state: dict) -> None:
    theirs = reference(state, clip.sizes)
    side = clip.sizes.input_resolution
    torch.manual_seed(0)
    images = torch.randn(2, 3, side, side)
    token_ids = tokenize(CAPTIONS, 32)
    padded = torch.nn.functional.pad(token_ids, (0, 77 - token_ids.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(
            clip.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            clip.encode_text(token_ids), theirs.encode_text(padded), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["plain", "archive"])
def test_features_equal_open_clips(files, kind: str) -> None:
    compare(build_clip(files[kind], trust_archive=True), read_weights(files["plain"]))


@pytest.mark.slow
def test_features_equal_open_clips_at_the_published_size() -> None:
    state = make_weights.torch_state(make_weights.make("vitb32", 1))
    compare(build_clip(state), state)


def test_archive_and_state_dict_hold_the_same(files) -> None:
    plain, archive = read_weights(files["plain"]), read_weights(files["archive"], True)
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


@pytest.mark.parametrize("keep", [0, 1000, 100_000])
@pytest.mark.parametrize("kind", ["plain", "archive"])
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

    def do_GET(self) -> None:
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

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "scripts/download_clip.sh"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "no_proxy": "127.0.0.1",
                 "base_url": f"http://127.0.0.1:{server.server_address[1]}"},
            capture_output=True,
            text=True,
        )  # fmt: skip

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
