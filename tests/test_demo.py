"""The demo and the soak test: flags that make no sense end before anything is removed or made."""

from __future__ import annotations

import pytest

from scripts import demo, soak


@pytest.mark.parametrize(
    "flags",
    [("--train_videos", "13"), ("--train_videos", "10"), ("--test_videos", "0"),
     ("--test_videos", "-2"), ("--epochs", "0"), ("--seed", "-1")],
)  # fmt: skip
def test_the_demo_keeps_an_earlier_one_when_it_is_called_wrongly(
    tmp_path, monkeypatch, capsys, flags
) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "clip.pt").touch()
    with pytest.raises(SystemExit):
        demo.main(flags)
    assert f"error: {flags[0]} must be" in capsys.readouterr().err
    assert (tmp_path / "demo" / "clip.pt").exists()


def test_the_soak_test_refuses_no_steps(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--steps", "0", "--output_dir", str(tmp_path / "soak")])
    assert "--steps and --epochs must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "soak").exists()
