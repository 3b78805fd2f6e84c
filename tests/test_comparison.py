import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import matplotlib as mpl
import pytest
import rich.console
import torch
from transformers import LlamaForCausalLM

import memkit
from memkit import comparison, hf
from memkit.budgets import with_rows
from memkit.comparison import Comparison, Measurement, against, compare, measure
from memkit.errors import InputError, ModelError, PolicyError
from memkit.hf.names import returned_cache
from memkit.layers import as_layers
from memkit.rendering import render
from memkit.viz.report import page
from tests.hf.tiny import Letters, randomised, tiny_config

mpl.use("agg")

# Merges by place in the text: equal letters have all but equal keys, and ties that rounding decides differ by split.
FREE = memkit.load_policy("untrained-block-mean", {"chunker.size": 8})
WINDOW = memkit.load_policy("window-512", {"window.size": 20})


@pytest.fixture(scope="module")
def loaded() -> hf.LoadedModel:
    return hf.LoadedModel(randomised(LlamaForCausalLM(tiny_config())), Letters(), "tiny", 0.5)


@pytest.fixture(scope="module")
def small(loaded: hf.LoadedModel) -> Comparison:
    return compare(["full", WINDOW, FREE], model=loaded, tokens=200, skip=50, decoded=3)


def plain(comparison: Comparison, width: int = 80) -> str:
    console = rich.console.Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison.table())
    return console.export_text()


def test_loss_is_the_untouched_models_over_the_scored_positions(loaded: hf.LoadedModel, small: Comparison):
    ids = torch.tensor([Letters()(comparison.default_text())["input_ids"][:200]])
    with torch.no_grad():
        logits = loaded.model(ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[49:199], ids[0, 50:])
    assert small.policies[0].loss == pytest.approx(float(expected), abs=1e-5)
    assert small.settings["scored"] == 150


@pytest.mark.parametrize(("segment", "cut"), [(7, 3), (50, 256), (64, 16), (200, 150)])
def test_segments_and_slices_change_no_loss(loaded, small, monkeypatch, segment, cut):
    monkeypatch.setattr(measure, "SEGMENT", segment)
    monkeypatch.setattr(measure, "SLICE", cut)
    again = compare(["full", WINDOW, FREE], model=loaded, tokens=200, skip=50, decoded=1)
    for one, other in zip(again.policies, small.policies, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert (one.slots, one.window) == (other.slots, other.window)


def test_costs_and_differences(loaded: hf.LoadedModel, small: Comparison):
    full, window, free = small.policies
    assert (full.slots, full.window, window.slots, window.window) == (0, 200, 0, 20)
    policy = FREE.build()
    assert free.slots == policy.slots_after(200)
    with torch.no_grad(), hf.attach(loaded.model, FREE):
        ids = torch.tensor([Letters()(comparison.default_text())["input_ids"][:200]])
        layers = hf.memories(returned_cache(loaded.model(ids, use_cache=True)))
    assert free.bytes == sum(memory.bytes for memory in layers)
    assert (full.difference, full.bytes_share, full.held_share) == (0, 1, 1)
    for entry in (window, free):
        assert entry.difference == pytest.approx(entry.loss - full.loss)
        assert entry.bytes_share == entry.bytes / full.bytes
        assert entry.held_share == (entry.slots + entry.window) / 200
        assert entry.read_seconds > 0
        assert entry.decode_ms > 0


def test_without_full_there_is_nothing_to_compare_with(loaded: hf.LoadedModel):
    alone = compare([WINDOW], model=loaded, tokens=60, skip=50, decoded=1)
    (entry,) = alone.policies
    assert (entry.difference, entry.difference_error, entry.bytes_share, entry.held_share) == (None,) * 4
    assert "compare streaming-4-512 and full too" in plain(alone)


def test_model_is_left_as_it_was_and_runs_repeat(loaded: hf.LoadedModel, small: Comparison):
    loaded.model.train()
    state = torch.random.get_rng_state()
    again = compare(["full", WINDOW, FREE], model=loaded, tokens=200, skip=50, decoded=1)
    assert [entry.loss for entry in again.policies] == [entry.loss for entry in small.policies]
    assert loaded.model.training
    assert torch.equal(state, torch.random.get_rng_state())
    loaded.model.eval()


def entry(policy: str, size: int, loss: float) -> Measurement:
    return Measurement(policy, loss, None, None, 1, 1, None, size, None, 1.0, 1.0)


def test_front():
    points = [("a", 10, 3.0), ("b", 10, 3.0), ("c", 10, 3.1), ("d", 20, 2.0), ("e", 30, 2.0), ("f", 5, 9.0)]
    measured = [against.Measured(as_layers(WINDOW), entry(*point), torch.zeros(1), None) for point in points]
    assert "".join(e.policy for e in against.against_others(measured) if e.front) == "abdf"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_neither_on_the_front_nor_drawn(loss: float, small: Comparison):
    losses = torch.full((4,), loss, dtype=torch.float64)
    measured = [
        against.Measured(as_layers(name), replace(entry(name, size, value)), each, None)
        for name, size, value, each in (
            ("full", 9, 1.0, torch.ones(4)),
            ("streaming-4-512", 3, 2.0, 2 * torch.ones(4)),
            ("h2o-512", 1, loss, losses),
        )
    ]
    found = against.against_others(measured)
    assert [each.front for each in found] == [True, True, False]
    assert [each.gap_closed for each in found] == [1.0, 0.0, None]
    shown = Comparison(small.settings, found)
    assert shown.plot().get_title(loc="left").endswith("no finite loss: h2o-512")
    assert "data-value=''" in page(shown)
    with pytest.raises(InputError, match="a loss must be a finite number to be drawn"):
        Comparison(small.settings, found[2:]).plot()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", shown.to_json()))
    again = Comparison.from_json(shown.to_json())
    assert math.isnan(again.policies[2].loss)
    assert again.policies[:2] == shown.policies[:2]


def test_where_there_is_no_gap_the_table_says_so(small: Comparison):
    both = Comparison(small.settings, (entry("full", 9, 2.0), entry("streaming-4-512", 3, 1.0)))
    assert "gap closed: unknown, for full predicts no better than streaming-4-512 here" in plain(both)
    assert "gap closed: compare streaming-4-512 and full too" in plain(Comparison(small.settings, both.policies[:1]))


def test_the_share_of_the_gap_that_is_closed():
    losses = {"full": [1.0, 2.0, 3.0], "streaming-4-512": [2.0, 4.0, 3.0], "window-512": [1.5, 2.0, 3.5]}
    measured = [
        against.Measured(as_layers(name), entry(name, 1, 1.0), torch.tensor(each).double(), 2 * torch.tensor(each))
        for name, each in losses.items()
    ]
    found = {each.policy: each for each in against.against_others(measured)}
    assert (found["full"].gap_closed, found["streaming-4-512"].gap_closed) == (1, 0)
    assert (found["full"].second_gap_closed, found["streaming-4-512"].second_gap_error) == (1, 0)
    saved = torch.tensor([0.5, 2.0, -0.5]).double()
    assert found["window-512"].gap_closed == pytest.approx(float(saved.mean()))  # the gap is 1
    assert found["window-512"].gap_error == pytest.approx(float(saved.std(correction=0)) / 3**0.5)
    alone = against.against_others(measured[1:])
    assert alone[0].gap_closed is None


def test_the_second_text_is_measured_at_the_same_positions(loaded: hf.LoadedModel, small: Comparison):
    text, options = comparison.default_text()[:300], {"model": loaded, "tokens": 200, "skip": 50, "decoded": 1}
    swapped = compare([WINDOW], text=comparison.second_text(), second=text, **options).policies[0]
    assert swapped.second_loss == pytest.approx(small.policies[1].loss)
    assert swapped.loss == pytest.approx(small.policies[1].second_loss)
    assert compare([WINDOW], text=text, **options).policies[0].second_loss is None
    longer = options | {"tokens": len(comparison.second_text()) + 100}
    assert compare([WINDOW], **longer).policies[0].second_loss is None
    with pytest.raises(InputError, match="length of given text"):
        compare([WINDOW], second="short", **options)


def test_the_peak_is_what_decoding_holds(loaded: hf.LoadedModel):
    spec = memkit.load_policy("untrained-kvm-fixed", {"chunker.size": 8, "growth.slots": 40})
    measured = compare([spec], model=loaded, tokens=200, skip=50, decoded=3).policies[0]
    assert measured.peak_bytes > measured.bytes  # slots stand beside the window while decoding


def test_json_is_as_documented(small: Comparison):
    data = json.loads(small.to_json())
    assert list(data) == ["settings", "policies"]
    names = [field.name for field in fields(Measurement)]
    assert {"policy", "loss", "bytes", "slots", "read_seconds", "decode_ms"} < set(names)
    assert all(list(row) == names for row in data["policies"])
    assert [row["policy"] for row in data["policies"]] == ["full", "window-512", "untrained-block-mean"]
    documented = (Comparison.__doc__ or "").partition("settings:")[2]
    assert [name for name in data["settings"] if name not in documented] == []
    assert data["settings"]["model"] == "tiny"
    assert data["settings"]["versions"]["torch"] == torch.__version__
    assert all(name in (Measurement.__doc__ or "") for name in names)


def test_pandas_frame(small: Comparison):
    frame = small.to_pandas()
    assert frame.policy.tolist() == ["full", "window-512", "untrained-block-mean"]
    assert frame.attrs["tokens"] == 200


def test_table_fits_80_columns_and_begins_with_the_front(small: Comparison):
    text = plain(small)
    assert "…" not in text
    rows = [
        line.split() for line in text.splitlines() if re.match(r"[ ●]+(full|window-512|untrained-block-mean) ", line)
    ]
    assert "gap" not in text.partition("full")[0]  # known of none of them
    order = [next(cell for cell in cells if cell != "●") for cells in rows]
    by_memory = sorted(small.policies, key=lambda e: (not e.front, e.bytes))
    assert order == [e.policy for e in by_memory]
    assert [cells[0] == "●" for cells in rows] == [e.front for e in by_memory]
    known = [replace(entry, gap_closed=0.5, gap_error=0.1) for entry in small.policies]
    some = replace(small, policies=tuple(known))
    header = plain(some).partition("full")[0]
    assert "gap" in header
    assert "second" not in header
    assert "gap" in render(some, "html").partition("</table>")[0]
    assert "second" not in render(some, "html").partition("</table>")[0]
    assert "gap closed</button>" in page(some)
    assert "second text</button>" not in page(some)
    for setting in ("tiny", "pydoc_data.topics", "200 tokens", f"threads {torch.get_num_threads()}", "torch", "seed 0"):
        assert setting in plain(small, 200)


def test_html_and_figure(small: Comparison):
    page: str = render(small, "html")
    assert page.count("<tr") == 4
    assert "untrained-block-mean" in page
    given = replace(small, settings=small.settings | {"text": "<script>"})
    assert "<script>" not in render(given, "html")
    axes = small.plot()
    assert {text.get_text() for text in axes.texts} == {"full", "window-512", "untrained-block-mean"}
    assert axes.get_xscale() == "log"
    assert small.plot(axes) is axes


def test_progress_reaches_the_end_of_every_policy(loaded: hf.LoadedModel):
    calls: list[tuple[str, int, int]] = []
    options = {"model": loaded, "tokens": 60, "skip": 50, "decoded": 2}
    compare([WINDOW, FREE], progress=lambda *call: calls.append(call), **options)
    assert [call for call in calls if call[1] == call[2]] == [
        ("window-512", 122, 122),
        ("untrained-block-mean", 122, 122),
    ]

    from memkit.viz.comparison import progress_bar

    with progress_bar(2) as report:
        compare([WINDOW, FREE], progress=report, **options)


def test_overrides_policies_of_ones_own_and_names(loaded: hf.LoadedModel):
    options = {"model": loaded, "tokens": 60, "skip": 50, "decoded": 1}
    names = [e.policy for e in compare([WINDOW, WINDOW.build(), WINDOW.named(None)], **options).policies]
    assert names == ["window-512", "window-512 (2)", "unnamed"]
    changed = compare(["window-512"], overrides={"window.size": 7}, **options)
    assert changed.policies[0].window == 7
    assert changed.settings["overrides"] == {"window.size": 7}
    assert "set: window.size=7" in plain(changed)


def test_text_of_ones_own(loaded: hf.LoadedModel, tmp_path: Path):
    options = {"model": loaded, "tokens": 60, "skip": 50, "decoded": 1}
    text = "Wer reitet so spät durch Nacht und Wind? " * 3
    path = tmp_path / "erlkönig.txt"
    path.write_text(text, encoding="utf-8")
    given, read = compare(["full"], text=text, **options), compare(["full"], text=path, **options)
    assert given.policies[0].loss == read.policies[0].loss
    assert (given.settings["text"], read.settings["text"]) == ("given text", "erlkönig.txt")
    assert given.settings["text_sha256"] == read.settings["text_sha256"]


def test_default_text_is_the_same_every_time():
    text = comparison.default_text()
    assert len(text) > 400_000
    assert text == comparison.default_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip": 0}, InputError, "skip must be a whole number, at least 1, got 0"),
        ({"tokens": 50}, InputError, r"tokens must be .* at least 51 \(skip \+ 1.*, got 50"),
        ({"decoded": 0}, InputError, "decoded must be a whole number, at least 1, got 0"),
        ({"text": "short"}, InputError, "tokens must be at most 5, the length of given text, got 60"),
        ({"text": ""}, InputError, "given text has no token to predict, got 0 tokens; give a longer text"),
        ({"text": Path("nowhere.txt")}, InputError, r"nowhere\.txt must be a text file in UTF-8"),
        ({"policies": ["ful"]}, PolicyError, "unknown policy 'ful'"),
        ({"policies": ["full", "kvm-sqrt-16"]}, ModelError, "kvm-sqrt-16, which needs merge weights"),
        ({"overrides": {"window.sice": 1}}, PolicyError, "sice"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_read(loaded, options, error, message):
    def never(*call: object) -> None:
        raise AssertionError(f"measured {call}")

    arguments = {"policies": ["window-512"], "model": loaded, "tokens": 60, "skip": 50, **options}
    with pytest.raises(error, match=message) as caught:
        compare(arguments.pop("policies"), progress=never, **arguments)
    assert "\n" not in str(caught.value)


def test_where_extras_are_missing_one_line_says_how_to_get_them(small: Comparison, monkeypatch: pytest.MonkeyPatch):
    for module, use, remedy in (
        ("pandas", small.to_pandas, "pip install pandas"),
        ("matplotlib", small.plot, r"pip install 'memkit-attention\[notebook\]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ModelError, match=remedy):
                use()


def test_importing_loads_no_heavy_package():
    program = "import sys, memkit.comparison; print({'rich', 'matplotlib', 'pandas', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_main_job_takes_less_than_six_minutes():
    whole = compare()
    assert [entry.policy for entry in whole.policies] == list(comparison.DEFAULT_POLICIES)
    full = whole.policies[0]
    assert all(math.isfinite(entry.loss) and entry.loss >= full.loss - 0.01 for entry in whole.policies)
    assert all(entry.bytes < full.bytes for entry in whole.policies[1:])
    measured = sum(entry.read_seconds for entry in whole.policies)
    assert whole.settings["load_seconds"] + measured < 360


def test_a_prompt_read_in_full(loaded: hf.LoadedModel):
    smaller = {"chunker.size": 8, "observe.queries": 8, "window.chunks": 3, "growth.slots": 20}
    spec = memkit.load_policy("caote-512", smaller)
    options = {"model": loaded, "tokens": 200, "skip": 150, "decoded": 1}
    whole = compare(["full", spec], prefill="full", **options)
    full, compressed = whole.policies
    assert full.loss == pytest.approx(compare(["full"], **options).policies[0].loss, abs=1e-5)
    assert (compressed.slots, compressed.window) == (20, 24)
    assert compressed.loss != compare([spec], **options).policies[0].loss
    again = memkit.load_policy(spec, {"observe.readers": "repeat"})
    assert compare([again], prefill="full", **options).policies[0].loss != compressed.loss
    assert whole.settings["prefill"] == "full"
    assert "read in full" in plain(whole)
    with pytest.raises(InputError, match="prefill must be 'policy' or 'full', got 'some'"):
        compare(["full"], prefill="some", **options)


def test_as_many_rows_for_everybody():
    for name in ("streaming-4-512", "window-512", "caote-512", "untrained-observed"):
        spec = with_rows(memkit.load_policy(name), 300).build()
        held = max(spec.slots_after(n) + n - int(spec.window.begin(n - 1)) for n in range(3900, 4100))
        assert held == 300, name
    for name in ("full", "kvm-sqrt-16", "block-mean-8", "block-window-3x256"):
        assert with_rows(memkit.load_policy(name), 300) == memkit.load_policy(name)
    with pytest.raises(InputError, match="rows must be at least 53 for caote-512, got 50"):
        with_rows(memkit.load_policy("caote-512"), 50)


def test_budgets_of_rows_share_and_bytes(loaded: hf.LoadedModel):
    spec = memkit.load_policy("caote-512", {"chunker.size": 8, "observe.queries": 8, "growth.slots": 20})
    options = {"model": loaded, "tokens": 200, "skip": 160, "decoded": 1}
    shared = compare(["full", spec], prefill="full", share=0.375, **options)
    rows = compare(["full", spec], prefill="full", rows=60, **options)
    assert shared.policies[1].loss == rows.policies[1].loss
    assert (shared.policies[1].slots, shared.policies[1].window) == (36, 24)
    assert (shared.settings["share"], shared.settings["rows"]) == (0.375, None)
    whole, sliding = compare(["full", WINDOW], bytes=40_000, **options).policies
    assert whole.loss == pytest.approx(rows.policies[0].loss, abs=1e-5)
    assert 34_000 < sliding.peak_bytes <= 40_000
    with pytest.raises(InputError, match="rows, share or bytes, got rows=60 and bytes=9; give one of them"):
        compare([spec], rows=60, bytes=9, **options)
    with pytest.raises(InputError, match="share is of the tokens of a prompt that is read in full"):
        compare([spec], share=0.5, **options)


def test_a_budget_too_small_for_streaming_is_no_error(loaded: hf.LoadedModel):
    """StreamingLLM is there for the gap alone, and nobody has asked for it."""
    result = compare(["full"], model=loaded, tokens=60, skip=50, decoded=1, rows=3)

    assert [entry.policy for entry in result.policies] == ["full"]
    assert result.policies[0].gap_closed is None
