"""The command line: what it prints, its exit codes, and that bad input is one line on standard error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for
from typer.testing import CliRunner

import memkit
from memkit import cli, comparison
from memkit.catalog import policies_folder
from memkit.cli import app
from memkit.costing import cost
from memkit.profiles import warn_of_even_shares
from memkit.schema import policy_schema
from memkit.viz.tables import amount

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of a command that exits with `code`; of one that fails, the one line on standard error."""
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments)
    assert result.exit_code == code, result.output
    if code == 0:
        assert result.stderr == ""
        return result.stdout
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.rstrip("\n")


def refused(*arguments: str) -> str:
    """What the command line says to arguments that it does not understand."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


# list and show


def test_list_names_every_policy_with_its_growth():
    lines = run("list").splitlines()
    for name in memkit.policy_names():
        assert any(line.split()[:1] == [name] for line in lines), name
    assert any("kvm-sqrt-16" in line and "sqrt factor=16" in line and "Key-Value Means" in line for line in lines)


def test_list_cuts_no_sentence_off():
    words = " ".join(run("list").split())
    assert "and the newest tokens, 512 a head" in words
    for end in (
        "any chunk said of it.",
        "small enough to train on a laptop.",
        "beginning with the window (arXiv 2605.09877",
    ):
        assert end in words


@pytest.mark.parametrize("name", memkit.policy_names())
def test_show_tells_what_a_policy_is_and_does(name: str):
    text = run("show", name)
    assert text.startswith(name)
    for said in ("window: {kind: ", "Who sees what", "1k", "1M", "prefill grows as N^"):
        assert said in text
    depends = "depends on the text and its queries" in text
    assert depends != memkit.load_policy(name).build().plans_ahead


def test_show_with_changes():
    text = run("show", "kvm-sqrt-16", "--set", "growth.factor=8", "--set", "window={kind: block, chunks: 3}")
    assert "growth: {kind: sqrt, factor: 8, floor: 256, first_chunk: whole}" in text
    assert "window: {kind: block, chunks: 3}" in text
    spec = memkit.load_policy("kvm-sqrt-16", {"growth.factor": 8, "window.chunks": 3})
    assert f"1M      {cost(spec, 1 << 20).slots:,}" in text


@pytest.mark.parametrize(
    ("shares", "shape"),
    [
        ("profile: smollm2-135m", "30 layers of 3 heads, width 64, float32, 1 row"),
        ("ratios: [1.5, 0.5]", "1 layer of 2 heads, width 64, float32, 1 row"),
    ],
)
def test_show_for_the_heads_that_shares_are_of(shares: str, shape: str):
    assert f"for {shape}; prefill grows" in run("show", "untrained-observed", "--set", f"heads={{{shares}}}")


def test_show_a_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("# My own.\nwindow: {kind: sliding, size: 7}\n# not its header\n")
    text = run("show", str(file))
    assert text.startswith("mine\nMy own.\n")
    assert "not its header" not in text


def test_show_writes_a_declaration_that_loads():
    lines = run("show", "ovq-1024").splitlines()
    declared = [line for line in lines if line.split(":")[0] in memkit.PolicySpec.model_fields]
    assert memkit.PolicySpec(**yaml.safe_load("\n".join(declared))) == memkit.load_policy("ovq-1024")


# cost


def test_cost_prints_what_costing_says():
    names = ["full", "kvm-fixed-256", "kvm-sqrt-16", "kvm-log-256"]
    text = run("cost", *names, "--tokens", "1000000")
    assert "1,000,000 tokens" in text
    for entry in (cost(name, 1_000_000) for name in names):
        line, held = (line for line in text.splitlines() if line.split()[:1] == [entry.policy])
        assert f"{entry.slots:,}" in line
        assert f"N^{entry.exponent:.2f}" in line
        assert amount(entry.peak_bytes, "B") in held


def test_cost_as_json():
    options = ["--heads", "9", "--kv-heads", "3", "--head-width", "32", "--value-width", "16"]
    options += ["--dtype", "bfloat16", "--layers", "30", "--rows", "2"]
    text = run("cost", "untrained-kvm-log", "full", *options, "--tokens", "4096", "--tokens", "100", "--json")
    shape: dict[str, Any] = {"heads": 9, "kv_heads": 3, "head_width": 32, "value_width": 16}
    shape |= {"dtype": "bfloat16", "layers": 30, "rows": 2}
    assert json.loads(text) == [
        cost(name, tokens, **shape).to_dict() for name in ("untrained-kvm-log", "full") for tokens in (4096, 100)
    ]


def test_cost_with_changes():
    (entry,) = json.loads(run("cost", "kvm-fixed-256", "--set", "growth.slots=300", "--tokens", "5000", "--json"))
    assert entry["slots"] == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "tokens must be a whole number, at least 1, got 0"),
        (["--heads", "3", "--kv-heads", "2"], "heads must be a multiple of the 2 kv_heads, got 3"),
        (["--dtype", "int8"], "dtype must be one of float32, float64, bfloat16, float16, got int8"),
    ],
)
def test_cost_refuses_numbers_that_do_not_fit(arguments: list[str], message: str):
    assert run("cost", "full", *arguments, code=2) == message


# compare


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `memkit compare` hands to `comparison.compare`, which does nothing but report."""
    calls: list[Any] = []

    class Nothing:
        def table(self) -> str:
            return "the table"

        def to_json(self) -> str:
            return '{"settings": {}, "policies": []}'

    def compare(policies: list[str], progress: Any, **options: Any) -> Nothing:
        assert progress is None  # no bar where standard error is no terminal
        calls.append((policies, options))
        return Nothing()

    monkeypatch.setattr(comparison, "compare", compare)
    return calls


DEFAULTS: dict[str, Any] = dict.fromkeys(("model", "text", "second", "tokens", "skip", "rows", "share", "bytes")) | {
    "prefill": "policy"
}


def test_compare_defaults(compared: list[Any]):
    assert run("compare") == "the table\n"
    options = DEFAULTS | {"overrides": {}}
    assert compared == [(list(comparison.DEFAULT_POLICIES), options)]


def test_compare_options(compared: list[Any], tmp_path: Path):
    out = tmp_path / "out.json"
    changes = ["--set", "window.chunks=8", "--set", "sinks=2"]
    run("compare", "full", "mine.yaml", "--model", "m", "--text", "t.txt", "--tokens", "64", "--skip", "8",
        *changes, "--json", str(out))  # fmt: skip
    options = DEFAULTS | {"model": "m", "text": Path("t.txt"), "tokens": 64, "skip": 8}
    assert compared == [(["full", "mine.yaml"], options | {"overrides": {"window.chunks": 8, "sinks": 2}})]
    assert json.loads(out.read_text()) == {"settings": {}, "policies": []}


def test_compare_of_a_prompt_read_in_full(compared: list[Any]):
    run("compare", "full", "--prefill", "full", "--rows", "512", "--second", "s.txt")
    options = DEFAULTS | {"prefill": "full", "rows": 512, "second": Path("s.txt"), "overrides": {}}
    assert compared == [(["full"], options)]
    assert run("compare", "--prefill", "some", code=2) == "--prefill must be one of policy, full, got some"


def test_passkeys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from memkit import passkey

    calls: list[Any] = []
    settings = {"tokens": 64, "text": "t", "model": "m", "prefill": "policy", "rows": None, "seed": 0, "overrides": {}}
    settings |= {"mentions": 2}

    def find(policies: list[str], progress: Any, **options: Any) -> passkey.Passkeys:
        calls.append((policies, options))
        found = passkey.Retrieval("full", 1, 2, 0.5, 0.1, 8, ((0.25, True, 0.4), (0.75, False, 0.6)))
        return passkey.Passkeys(settings, (found,))

    monkeypatch.setattr(passkey, "find_passkeys", find)
    out = tmp_path / "out.json"
    text = run("compare", "full", "--passkey", "--placements", "2", "--rows", "512", "--json", str(out))
    options = {"model": None, "text": None, "prefill": "policy", "rows": 512, "overrides": {}}
    options |= {"share": None, "bytes": None}
    assert calls == [(["full"], options | {"tokens": 2048, "placements": 2, "mentions": 2})]
    assert "1/2" in text
    assert json.loads(out.read_text())["policies"][0]["found"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--passkey", "--skip", "9"), "--passkey scores a hidden number alone; leave --second and --skip out"),
        (("--passkey", "--second", "a.txt"), "--passkey scores a hidden number alone; leave --second and --skip out"),
        (
            ("--mentions", "1"),
            "--mentions says how often --passkey says a number; give --passkey too, or leave it out",
        ),
        (
            ("--placements", "9"),
            "--placements says where --passkey hides a number; give --passkey too, or leave it out",
        ),
    ],
)
def test_options_that_say_nothing_together_are_refused(compared: list[Any], options: tuple[str, ...], message: str):
    assert run("compare", *options, code=2) == message
    assert compared == []


def test_compare_finds_out_that_it_cannot_write_before_it_works(compared: list[Any], tmp_path: Path):
    for out in (tmp_path / "nowhere" / "out.json", tmp_path):
        message = run("compare", "--json", str(out), code=2)
        assert message == f"--json {out}: must be a file in a folder that exists; make the folder first"
    assert compared == []


def test_a_file_that_may_not_be_written_to_is_found_out_before_work(
    compared: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "held.json").touch()
    for name, looked_at in {"out.json": tmp_path, "held.json": tmp_path / "held.json"}.items():
        monkeypatch.setattr(os, "access", lambda path, mode, at=looked_at: (path, mode) != (at, os.W_OK))
        message = run("compare", "--json", str(tmp_path / name), code=2)
        assert message == f"--json {tmp_path / name}: cannot be written; name a file in a folder of yours"
    assert compared == []


def test_what_was_measured_is_written_even_where_nobody_reads_the_table(
    compared: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def closed(*renderables: Any) -> None:
        raise SystemExit(1)  # what rich does where a pipe is closed

    monkeypatch.setattr("memkit.viz.show", closed)
    result = CliRunner().invoke(app, ["compare", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 1
    assert json.loads((tmp_path / "out.json").read_text()) == {"settings": {}, "policies": []}


def test_an_encoding_without_the_signs_of_a_table_is_no_error():
    command = [sys.executable, "-c", "from memkit.cli import app; app()", "show", "kvm-sqrt-16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"grows as 16??t" in done.stdout


@pytest.mark.parametrize("command", [["profile"], ["compare"], ["compare", "--passkey"], ["eval", "--tasks", "x"]])
def test_where_transformers_is_missing_one_line_says_how_to_get_it(command: list[str], monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["memkit", "hf"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    said = run(*command, code=2)
    assert said.startswith("stock models need transformers, accelerate and gguf, got: ")
    assert said.endswith("pip install 'memkit-attention[hf]'")


# schema


def test_the_schema_in_docs_is_what_the_command_prints():
    command = [sys.executable, "-c", "from memkit.cli import app; app()", "schema"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
    assert printed == (ROOT / "docs" / "policy.schema.json").read_text(encoding="utf-8"), (
        "run: memkit schema --out docs/policy.schema.json"
    )


def test_schema_to_a_file(tmp_path: Path):
    assert run("schema", "--out", str(tmp_path / "s.json")) == ""
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(run("schema"))
    assert "cannot be written" in run("schema", "--out", str(tmp_path), code=2)


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(policy_schema())
    kind = validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("name", memkit.policy_names())
def test_the_schema_takes_every_shipped_policy(name: str, validator: Any):
    validator.validate(yaml.safe_load((policies_folder() / f"{name}.yaml").read_text()))
    validator.validate(yaml.safe_load(memkit.load_policy(name).to_yaml()))


@pytest.mark.parametrize(
    "text",
    [
        "windw: {kind: all}",
        "window: {kind: al}",
        "window: {chunks: 2}",
        "window: {kind: block}",
        "window: {kind: block, chunks: 0}",
        "window: {kind: block, chunk: 2}",
        "growth: {kind: sqrt, factor: many}",
        "growth: {kind: sqrt, factor: 0}",
        "growth: {kind: sqrt, slots: 3}",
        "growth: sqrt",
        "readout: {key: layernorm}",
        "readout: {keys: mean}",
        "merging: {kind: weighted-mean, weight: learned, weigh: {key: true}}",
        "sinks: -1",
        "sinks: four",
        "- full",
    ],
)
def test_the_schema_refuses_typos_as_loading_does(text: str, validator: Any, tmp_path: Path):
    assert not validator.is_valid(yaml.safe_load(text))
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(memkit.PolicyError):
        memkit.load_policy(file)


def test_the_schema_describes_every_field(validator: Any):
    def walk(schema: dict[str, Any]) -> None:
        for name, field in schema.get("properties", {}).items():
            assert name == "kind" or field.get("description"), name
            for option in field.get("oneOf", []):
                assert option["description"]
                walk(option)
        for definition in schema.get("$defs", {}).values():
            walk(definition)

    walk(validator.schema)


# --import


OWN = """
from typing import Literal
import memkit
from memkit.pieces import Merging, MergingSpec

@memkit.register
class SumSpec(MergingSpec):
    '''A rule of my own.'''
    kind: Literal["my-sum"] = "my-sum"
    def build(self):
        return Merging()
"""


def test_pieces_of_ones_own_from_the_working_folder(tmp_path: Path):
    (tmp_path / "mymodule.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text("window: {kind: block, chunks: 2}\nmerging: {kind: my-sum}\n")

    def memkit_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "import sys; sys.path.remove(''); from memkit.cli import app; app()"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert "merging: {kind: my-sum}" in memkit_command("show", "mine.yaml", "--import", "mymodule").stdout
    assert "A rule of my own." in memkit_command("schema", "--import", "mymodule").stdout
    refused = memkit_command("train", "tiny-full", "--out", "run", "--task", "mqr", "--import", "mymodule")
    assert "unknown task kind 'mqr'" in refused.stderr
    sweep = memkit_command("sweep", "none.yaml", "--out", "run", "--import", "mymodule")
    assert "none.yaml" in sweep.stderr
    without = memkit_command("show", "mine.yaml")
    assert without.returncode == 2
    assert without.stderr.startswith("mine.yaml: merging.kind: unknown merging kind 'my-sum'")
    assert "a kind of your own must be imported first: `--import MODULE`" in without.stderr


def test_a_module_that_cannot_be_imported_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "faulty_module_of_mine.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = run("cost", "full", "--import", "no_such_module_of_mine", code=2)
    assert message.startswith("--import no_such_module_of_mine: cannot be imported: ModuleNotFoundError")
    message = run("cost", "full", "--import", "faulty_module_of_mine", code=2)
    assert "cannot be imported: ZeroDivisionError: division by zero; run python -c" in message


# Bad input


def test_a_typo_in_a_policy_file_is_one_line_and_exit_code_2(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text((policies_folder() / "kvm-sqrt-16.yaml").read_text().replace("factor: 16", "fctor: 16"))
    for command in (["show"], ["cost"], ["cost", "full"], ["compare", "full"]):
        message = run(*command, str(file), code=2)
        known = "floor, cap, round_down, counts, first_chunk, factor"
        assert message == f"{file}: growth.fctor: unknown field; did you mean 'factor'? known: {known}"


def test_a_file_of_layers_policies_is_no_policy(tmp_path: Path):
    file = tmp_path / "mixed.yaml"
    file.write_text('default: full\nat: {"0": streaming-4-512}\n')
    for command in ("show", "check", "bench"):
        assert run(command, str(file), code=2).startswith(f"{file}: is a policy for each layer; memkit show, check and")
    assert "mixed" in run("cost", str(file), "--layers", "3", "--tokens", "100")


def test_a_model_without_weights_says_so_before_what_it_generates():
    arguments = ["generate", "--prompt-ids", "1,2", "--max-new-tokens", "2"]
    drawn = CliRunner().invoke(app, [*arguments, "tiny-ovq"])
    assert drawn.stderr == "tiny-ovq has no weights: freshly initialised\n"
    assert len(drawn.stdout.split(",")) == 2
    assert CliRunner().invoke(app, [*arguments, "tiny-full"]).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "kvm-sqr-16"], "unknown policy 'kvm-sqr-16'; did you mean 'kvm-sqrt-16'? known: "),
        (["show", "nowhere.yaml"], "nowhere.yaml: no such file; give the path of a policy's YAML or one of: "),
        (["show", "full", "--set", "sinks"], "--set sinks: must be FIELD=VALUE, as in --set growth.factor=8"),
        (["show", "full", "--set", "=3"], "--set =3: must be FIELD=VALUE, as in --set growth.factor=8"),
        (["show", "full", "--set", "window={"], "--set window={: not YAML: expected "),
        (["show", "full", "--set", "sinks=many"], "full: sinks: must be a valid integer, got 'many'"),
        (["cost", "full", "--set", "growth.factor=2"], "full: growth.factor: unknown field; this kind has none"),
        (["cost", "full", "--set", "growth={factor: 2}"], "full: growth.kind: says which growth is meant; one of "),
        (["show", "full", "--set", "sinks=1", "--set", "sinks=2"], "--set sinks=2: sinks is given twice; leave one"),
        (
            ["show", "full", "--set", "window={kind: all, kind: all}"],
            "--set window={kind: all, kind: all}: kind: is gi",
        ),
        (["show", "full", "--set", f"sinks={'[' * 3000}"], "--set sinks=[["),
        (["show", "kvm-sqrt-16", "--set", "growth.factor=1.0e+308"], "kvm-sqrt-16: growth.factor: must be less than"),
        (["show", "full", "--set", "sinks=" + "9" * 21], "full: sinks: must be less than or equal to 1048576, got 99"),
        (["cost", "full", "--heads", "0"], "heads must be a whole number, at least 1, got 0"),
        (["cost", "full", "--layers", "-3"], "layers must be a whole number, at least 1, got -3"),
        (["cost", "full", "--tokens", "10000000000"], "tokens must be a whole number, at most 268435456, got 10000000"),
        (["bench", "full", "--heads", "0"], "heads must be a whole number, at least 1, got 0"),
        (["bench", "full", "--heads", "3", "--kv-heads", "2"], "heads must be a multiple of the 2 kv_heads, got 3"),
        (["bench", "full", "--tokens", "999999999999"], "rows × heads × tokens × head_width must give at most"),
        (["bench", "full", "--repeats", "0"], "repeats must be a whole number, at least 1, got 0"),
        (["bench", "full", "--figure", "x.foo"], "--figure x.foo: must end in .png, .svg, .pdf"),
        (["bench", "full", "--figure", "/nowhere/x.png"], "--figure /nowhere/x.png: must be a file in a folder that"),
        (["bench", "full", "--json", "x" * 300], "--json xxx"),
        (["compare", "--skip", "0"], "skip must be a whole number, at least 1, got 0"),
        (["compare", "--json", "x" * 300], "--json xxx"),
        (["profile", "--beside", "nothing"], "unknown profile 'nothing'"),
        (["profile", "--readers", "some"], "readers must be 'next', 'repeat', 'mixed' or 'asked', got 'some'"),
        (["profile", "--tokens", "600"], "tokens must be a whole number, at least 1024, got 600"),
        (
            ["show", "full", "--set", "window=block"],
            "full: window: must be a mapping with a kind, as {kind: block}, got 'block'; kinds: ",
        ),
        (["show", "full", "--set", "window.kind=1"], "full: window.kind: says which window is meant, got 1; one of "),
        (["show", "full", "--set", "readout=plain"], "full: readout: must be a mapping of its fields, got 'plain'"),
        *(
            (["compare", "--model", "tiny-full", option, "0"], f"{option} is for stock models, got tiny-full")
            for option in ("--rows", "--share", "--bytes")
        ),
        (
            ["compare", "--model", "tiny-full", "--set", "sinks=1"],
            "overrides (--set) change the policies that are named",
        ),
        (["generate", "tiny-full", "--prompt-ids", "1_0"], "--prompt-ids 1_0: must be token ids with commas between"),
        (
            ["generate", "tiny-full", "--prompt-ids", "1", "--seed", "9" * 30],
            "seed must be a whole number, at most 1844",
        ),
        (["generate", "tiny-full", "--prompt-ids", "1", "--top-k", "0"], "top_k must be a whole number, at least 1"),
        (["generate", "tiny-full", "--prompt-ids", "1", "--temperature", "nan"], "temperature must be at least 0"),
        (["generate", "tiny-full", "--prompt-ids", "1", "--stop-ids", "999"], "stop_ids must lie between 0 and 255"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str):
    assert run(*arguments, code=2).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["show"], "Missing argument"),
        (["cost", "full", "--toknes", "1"], "--toknes"),
        (["cost", "full", "--tokens", "many"], "Invalid value for '--tokens'"),
        (["cost", "full", "--tokens"], "'--tokens' requires an argument"),
        (["check", "full", "--examples", "0"], "Invalid value for '--examples'"),
        (["check", "full", "--examples", "9" * 20], "Invalid value for '--examples'"),
        (["generate", "tiny-full"], "give --prompt-ids or --prompt, got neither"),
        (["--frobnicate"], "--frobnicate"),
        (["cost", "full", "--tokens", "9" * 9000], "Invalid value for '--tokens'"),
    ],
)
def test_arguments_that_are_not_understood_exit_with_2(arguments: list[str], message: str):
    said = refused(*arguments)
    assert message in said
    assert said.count("\n") == 1
    assert len(said) < 600


def test_version_and_help():
    assert run("--version") == f"memkit {memkit.__version__}\n"
    text = run("--help")
    for command in ("list", "show", "cost", "compare", "schema"):
        assert f"\n  {command} " in text
        assert "Options:" in run(command, "--help")


def test_exit_codes_reach_the_shell():
    command = [sys.executable, "-c", "from memkit.cli import app; app()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    assert shell("--version").returncode == 0
    bad = shell("show", "kvm-sqrt-17")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert shell("frobnicate").returncode == 2


def test_the_command_line_loads_nothing_heavy_before_it_must():
    program = (
        "import sys; from memkit.cli import app; app(['--version'], standalone_mode=False);"
        "print([name for name in ('transformers', 'rich', 'matplotlib', 'hypothesis') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines()[-1] == "[]"


def test_a_former_name_is_said_once_in_one_line():
    result = CliRunner().invoke(app, ["show", "free-kvm-sqrt"])
    assert result.exit_code == 0
    assert result.stderr == "memkit: policy free-kvm-sqrt is called untrained-kvm-sqrt now; the old name goes soon\n"
    assert "untrained-kvm-sqrt" in result.stdout


def test_even_shares_are_said_once_in_one_line(capsys: pytest.CaptureFixture[str]):
    facts = {"model_type": "qwen2", "num_hidden_layers": 3, "num_key_value_heads": 2}
    with cli._notices_are_one_line():
        for _ in range(2):
            warn_of_even_shares([memkit.load_policy("untrained-observed")], facts)
    said = capsys.readouterr().err
    assert said.startswith("memkit: no head profile is shipped for this model (qwen2, 3 layers × 2 key/value heads)")
    assert said.count("\n") == 1
