"""Shards: every name belongs to one of them, and torchrun's rank is the default."""

from __future__ import annotations

import argparse

import pytest

from utils.shards import Shard, add_shard_flag


def shard_of(arguments: list[str]) -> Shard:
    parser = argparse.ArgumentParser()
    add_shard_flag(parser)
    return parser.parse_args(arguments).shard


def test_every_name_is_in_one_shard_and_all_get_about_as_many():
    names = [f"v_{i:04}" for i in range(3000)] + ["ünder", "\udcff"]
    owners = [[i for i in range(3) if Shard(i, 3).has(name)] for name in names]
    assert all(len(owner) == 1 for owner in owners)
    for i in range(3):
        assert owners.count([i]) == pytest.approx(1000, rel=0.1)
    assert all(Shard().has(name) for name in names)


def test_the_flag_else_torchrun_else_everything(monkeypatch):
    assert shard_of([]) == Shard(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of([]) == Shard(1, 4)
    assert shard_of(["--shard", "0/2"]) == Shard(0, 2)


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "1/0", "a/b", "1/2/3", ""])
def test_what_is_no_shard_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        shard_of([f"--shard={text}"])
    assert "--shard" in capsys.readouterr().err
