"""Benchmarks run and report what they say; no figure of theirs is tested."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import memkit
from memkit import benchmark
from memkit.cli import app

SMALL = {"chunker.size": 16, "growth.slots": 16}


def test_every_mode_is_timed_against_full_attention() -> None:
    spec = memkit.load_policy("kvm-fixed-256", SMALL)
    result = benchmark.bench([spec, "untrained-kvm-sqrt"], [64, 128], heads=2, kv_heads=1, head_width=8, repeats=2)
    assert {(row.policy, row.mode, row.tokens) for row in result.timings} == {
        (name, mode, tokens)
        for name in ("kvm-fixed-256", "untrained-kvm-sqrt")
        for mode in benchmark.MODES
        for tokens in (64, 128)
    }
    for row in result.timings:
        assert 0 < row.low <= row.seconds <= row.high
        assert row.factor == row.full_seconds / row.seconds
        assert row.limit_share > 0
    told = json.loads(result.to_json())
    assert told["timings"][0].keys() >= {"policy", "mode", "tokens", "seconds", "factor", "limit_share"}


def test_peak_is_of_a_process_that_trains() -> None:
    result = benchmark.bench(["window-512"], 64, heads=1, head_width=8, modes=["train"], repeats=1, peak=True)
    assert result.timings[0].peak_bytes is not None
    assert result.timings[0].peak_bytes > 50e6  # no process with PyTorch loaded is smaller


def test_no_number_of_the_table_is_cut_off_in_80_columns() -> None:
    timing = benchmark.Timing("untrained-observed-sqrt", "forward", 16_384, 1.234, 1.2, 1.4, 1.0, 1.0, 10**9)
    settings = {"heads": 6, "versions": {"torch": "2"}}
    written = io.StringIO()
    Console(width=80, file=written).print(benchmark.Bench(settings, [timing]).table())
    words = written.getvalue().split()
    for word in ("untrained-observed-sqrt", "forward", "16,384", "1,234", "1,200–1,400", "0.81", "81%", "1.00"):
        assert word in words


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(memkit.InputError, match="modes must be among forward, train, decode, got bakward"):
        benchmark.bench(["full"], 64, modes=["bakward"])  # type: ignore[list-item]
    with pytest.raises(memkit.InputError, match="tokens must be a whole number, at least 2, got 1"):
        benchmark.bench(["full"], 1)


def test_command_writes_json_and_figure(tmp_path: Path) -> None:
    out, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--tokens", "64", "--heads", "1", "--head-width", "8", "--repeats", "1", "--mode", "forward"]
    outcome = CliRunner().invoke(app, ["bench", "full", *options, "--json", str(out), "--figure", str(figure)])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(out.read_text())["settings"]["heads"] == 1
    assert figure.read_bytes().startswith(b"\x89PNG")
