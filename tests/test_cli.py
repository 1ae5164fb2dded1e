"""The command line, run as a user runs it: output, exit status, and one-line errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_federation import tiny_federation
from typer.testing import CliRunner

import protoken
from protoken.cli import app
from protoken.ledger import export_rounds

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model`, its ledger `ledger`."""
    path = tmp_path_factory.mktemp("cli")
    federation = tiny_federation(path, "smollm", rounds=2)
    federation.model.save_pretrained(path / "model")
    character_tokenizer().save_pretrained(path / "model")
    federation.path.rename(path / "ledger")
    return path


def protoken_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "protoken", *arguments], capture_output=True, text=True, timeout=900, check=False
    )


def test_env_names_versions_native_modules_and_backends() -> None:
    result = run(app, ["env"])
    assert result.exit_code == 0
    for expected in ("torch", "protoken._C", "client_scores", "cpp"):
        assert expected in result.output


@pytest.mark.parametrize("columns", [24, 40, 60, 80])
def test_a_narrow_terminal_cuts_no_figure_and_says_what_it_has_no_room_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    def shown(command: str, width: int) -> tuple[set[str], str]:
        monkeypatch.setenv("COLUMNS", str(width))
        output = run(app, ["ledger", command, str(folder / "ledger")]).output
        assert max(map(len, output.splitlines())) <= width
        rows = [line for line in output.splitlines() if re.match(r"([12]|ada|bob|cleo|null) ", line)]
        return {word for row in rows for word in row.split()}, " ".join(output.split())

    for command, least in (("ls", {"1", "2"}), ("show", {"ada", "bob", "cleo", "null", "0.4"})):
        (whole, everything), (narrow, text) = shown(command, 200), shown(command, columns)
        assert "no room for" not in everything
        assert narrow <= whole
        assert least <= narrow
        assert ("no room for" in text) == (narrow != whole)


def test_models_lists_every_family() -> None:
    from protoken.models.families import FAMILIES

    result = run(app, ["models"])
    assert result.exit_code == 0
    assert all(family in result.output for family in FAMILIES)


def test_trace_prints_a_ranking_and_writes_page_and_json(folder: Path, tmp_path: Path) -> None:
    arguments = ["trace", "hello", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    files = ["--html", str(tmp_path / "t.html"), "--json", str(tmp_path / "t.json")]
    result = run(app, [*arguments, *files, "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    for client in ("ada", "bob", "cleo", "null"):
        assert client in result.output
    loaded = protoken.Trace.load(tmp_path / "t.json")
    assert len(loaded.token_list) == 4
    assert "<html" in (tmp_path / "t.html").read_text()


def test_trace_takes_the_settings_of_the_method(folder: Path, tmp_path: Path) -> None:
    arguments = ["trace", "hello", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    file = tmp_path / "t.json"
    for method, option, value in (("aumann_shapley", "nodes", 1), ("paired_shapley", "pairs", 0)):
        asked = ["--method", method, f"--{option}", str(value), "--objective", "log_odds", "--rounds", "all"]
        result = run(app, [*arguments, *asked, "--json", str(file), "--max-new-tokens", "3"])
        assert result.exit_code == 0, result.output
        info = protoken.Trace.load(file).info
        assert (info.method, info.objective, info.settings[option]) == (method, "log_odds", value)


def test_trace_takes_a_response_from_a_log_and_its_lineage(folder: Path, tmp_path: Path) -> None:
    arguments = ["trace", "hello", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    file = tmp_path / "t.json"
    for options in (["--response", "bye."], ["--response", "bye.", "--lineage"]):
        result = run(app, [*arguments, *options, "--json", str(file)])
        assert result.exit_code == 0, result.output
        assert "handed in" in result.output
        trace = protoken.Trace.load(file)
        assert (trace.response, trace.info.forced) == ("bye.", True)
    assert (trace.info.method, trace.info.rounds, trace.info.settings["nodes"]) == ("aumann_shapley", (1, 2), 1)
    result = run(app, [*arguments, "--response", "bye.", "--lineage", "--nodes", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert protoken.Trace.load(file).info.settings["nodes"] == 2
    for wrong in (["--nodes", "0"], ["--pairs", "2"]):
        refused = run(app, [*arguments, "--lineage", *wrong])
        assert refused.exit_code != 0
        assert wrong[0].removeprefix("--") in f"{refused.output}{refused.exception}"
    refused = run(app, [*arguments, "--lineage", "--method", "shapley"])
    assert refused.exit_code == 2
    assert "--lineage" in refused.output


def test_trace_takes_what_is_traced_and_how(folder: Path, tmp_path: Path) -> None:
    arguments = ["trace", "hello", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    arguments += ["--max-new-tokens", "3", "--json", str(tmp_path / "t.json")]
    chosen = ["--layers", "*o_proj", "--way", "reverse", "--granularity", "layer", "--memory-limit", "1GB"]
    result = run(app, [*arguments, *chosen])
    assert result.exit_code == 0, result.output
    trace = protoken.Trace.load(tmp_path / "t.json")
    assert (trace.info.way, trace.info.granularity) == ("reverse", "layer")
    assert trace.info.layers
    assert all(layer.endswith("o_proj") for layer in trace.info.layers)
    for option, value in (("--way", "sideways"), ("--granularity", "client"), ("--memory-limit", "much")):
        refused = run(app, [*arguments, option, value])
        assert refused.exit_code != 0
        assert option[2:].replace("-", "_") in f"{refused.output}{refused.exception}"
        refused = run(app, [*arguments, "--lineage", option, value])
        assert refused.exit_code != 0


def test_trace_follows_the_answer_through_the_rounds(folder: Path, tmp_path: Path) -> None:
    arguments = ["trace", "hello", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    page = tmp_path / "history.html"
    result = run(app, [*arguments, "--max-new-tokens", "3", "--history", str(page)])
    assert result.exit_code == 0, result.output
    assert "that round's model" in result.output
    assert "When was this answer learnt" in page.read_text(encoding="utf-8")


def test_error_is_one_line_with_exit_status_2(folder: Path) -> None:
    done = protoken_command("trace", "x", "--model", str(folder / "model"), "--ledger", str(folder / "nothing"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    # Libraries that transformers loads have things of their own to say: they name their files, or log as torch does.
    others = re.compile(r"site-packages|^[IWE]\d{4} \d\d:\d\d:")
    lines = [line for line in done.stderr.strip().splitlines() if not others.search(line)]
    assert len(lines) == 1
    assert lines[0].startswith("LedgerFormatError ")


def test_ledger_ls_show_and_verify(folder: Path) -> None:
    ledger = str(folder / "ledger")
    rows = json.loads(run(app, ["ledger", "ls", ledger, "--json"]).output)
    assert [row["round"] for row in rows] == [1, 2]
    shown = json.loads(run(app, ["ledger", "show", ledger, "1", "--json"]).output)
    assert {client["client"] for client in shown["clients"]} == {"ada", "bob", "cleo", "null"}
    assert "ada" in run(app, ["ledger", "show", ledger]).output
    assert "Residual: what a round's change is beyond" in run(app, ["ledger", "ls", ledger]).output
    found = run(app, ["ledger", "verify", ledger, "--conservation"])
    assert found.exit_code == 0
    assert "--pinned" in found.output
    head = str(protoken.Ledger.open(ledger).head)
    pinned = run(app, ["ledger", "verify", ledger, "--pinned", head])
    assert pinned.exit_code == 0
    assert "rewritten" not in pinned.output
    other = run(app, ["ledger", "verify", ledger, "--pinned", f"2:{'0' * 64}"])
    assert other.exit_code == 1
    assert "NOT SOUND" in other.output


def test_verify_fails_on_a_changed_byte(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "ledger", tmp_path / "ledger")
    shard = max((tmp_path / "ledger").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    result = run(app, ["ledger", "verify", str(tmp_path / "ledger")])
    assert result.exit_code == 1
    assert "NOT SOUND" in result.output


def test_ledger_import_reads_a_folder_per_round(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    names = ["model.layers.0.mlp.down_proj.weight"]
    start = {names[0]: torch.zeros(3, 5)}
    step = {"a": torch.ones(3, 5), "b": -torch.ones(3, 5) * 3}
    (tmp_path / "runs" / "round-1" / "clients").mkdir(parents=True)
    save_file(start, tmp_path / "runs" / "global.safetensors")
    save_file({names[0]: torch.full((3, 5), -1.0)}, tmp_path / "runs" / "round-1" / "global.safetensors")
    for client, delta in step.items():
        save_file({names[0]: delta}, tmp_path / "runs" / "round-1" / "clients" / f"{client}.safetensors")
    result = run(app, ["ledger", "import", str(tmp_path / "ledger"), str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    record = protoken.Ledger.open(tmp_path / "ledger").round(1)
    assert torch.equal(record.delta("b", names[0]), step["b"])
    assert record.relative_residual[names[0]] < 1e-6
    assert export_rounds(protoken.Ledger.open(tmp_path / "ledger"), tmp_path / "out")


def test_folder_of_a_file_to_come_is_made_before_the_work(folder: Path, tmp_path: Path) -> None:
    asked = ["trace", "hi", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    page = tmp_path / "new" / "deep" / "t.html"
    assert run(app, [*asked, "--max-new-tokens", "1", "--html", str(page)]).exit_code == 0
    assert page.is_file()
    taken = tmp_path / "file"
    taken.touch()
    for option in ("--html", "--json", "--history"):
        for place in (taken / "t.html", tmp_path):
            refused = run(app, ["trace", "hi", "--model", "not loaded", "--ledger", "not read", option, str(place)])
            assert refused.exit_code == 2
            assert option in refused.output


def test_file_that_is_not_there_is_one_line(folder: Path, tmp_path: Path) -> None:
    probe = ["records", "probe", str(tmp_path / "none.json"), "--model", "m", "--ledger", "l", "--out"]
    done = protoken_command(*probe, str(tmp_path / "probe"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("FileNotFoundError ")
    assert "none.json" in done.stderr


def test_response_takes_no_settings_of_a_generation(folder: Path) -> None:
    asked = ["trace", "hi", "--model", str(folder / "model"), "--ledger", str(folder / "ledger"), "--response", "bye."]
    for more in (["--max-new-tokens", "3"], ["--max-new-tokens", "64"], ["--sample"]):
        refused = run(app, [*asked, *more])
        assert refused.exit_code == 2
        assert "--response" in refused.output


def test_a_hyphen_is_no_name_of_a_file(folder: Path) -> None:
    asked = ["trace", "hi", "--model", str(folder / "model"), "--ledger", str(folder / "ledger"), "--json", "-"]
    refused = run(app, asked)
    assert refused.exit_code == 2
    assert "/dev/stdout" in refused.output
    assert not Path("-").exists()


def test_import_of_nothing_makes_no_ledger(tmp_path: Path) -> None:
    for source in (tmp_path / "none", tmp_path):
        result = run(app, ["ledger", "import", str(tmp_path / "ledger"), str(source)])
        assert isinstance(result.exception, protoken.errors.ArgumentError)
    assert not (tmp_path / "ledger").exists()


def test_overhead_names_what_it_cannot_measure() -> None:
    for asked in (["--device", "abacus"], ["--prompt-tokens", "0"], ["--clients", "0"]):
        result = run(app, ["bench", "overhead", *asked])
        assert isinstance(result.exception, protoken.errors.ArgumentError), result.output


def test_mistyped_head_or_key_accuses_no_ledger(folder: Path) -> None:
    for option, wrong in (("--pinned", "2:abc"), ("--server-key", "zz")):
        result = run(app, ["ledger", "verify", str(folder / "ledger"), option, wrong])
        assert isinstance(result.exception, protoken.errors.ArgumentError)
        assert "SOUND" not in result.output


def test_the_package_does_not_load_transformers_before_there_is_a_model() -> None:
    """It takes seconds, and a ledger can be read without it."""
    heavy = ("transformers", "peft", "accelerate", "triton", "matplotlib")
    code = f"import sys, protoken, protoken.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- what is at the other end --------------------------------------------------------------------------------------


def own_lines(stderr: str) -> list[str]:
    """Without what libraries that transformers loads have to say."""
    others = re.compile(r"site-packages|^[IWE]\d{4} |Loading weights|^$")
    return [line for line in stderr.splitlines() if not others.search(line)]


def test_a_terminal_of_no_width_is_one_of_unknown_width() -> None:
    command = [sys.executable, "-m", "protoken", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "0"})
    assert "ledger" in done.stdout


def test_verify_of_what_is_no_ledger_judges_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "none", tmp_path / "file"):
        result = run(app, ["ledger", "verify", str(place)])
        assert isinstance(result.exception, protoken.errors.ArgumentError)
        assert str(place) in str(result.exception)
        assert "SOUND" not in result.output


def test_a_ledger_that_lost_a_file_is_not_sound(folder: Path, tmp_path: Path) -> None:
    for name in ("ledger.json", "HEAD", "rounds"):
        copy = tmp_path / name
        shutil.copytree(folder / "ledger", copy)
        (copy / name).rename(tmp_path / f"lost-{name}")
        result = run(app, ["ledger", "verify", str(copy)])
        assert result.exit_code == 1
        assert "NOT SOUND" in result.output


def test_prune_asks_nothing_where_there_is_nothing_to_prune(folder: Path, tmp_path: Path) -> None:
    for asked in ([str(tmp_path), "1"], [str(folder / "ledger"), "7"]):
        result = run(app, ["ledger", "prune", *asked])
        assert isinstance(result.exception, protoken.errors.LedgerError)
        assert "for good" not in result.output


@pytest.mark.parametrize(
    "wrong", [["--rounds", "x"], ["--method", "x"], ["--objective", "x"], ["--seed", "-1"]], ids=str
)
def test_a_wrong_choice_is_refused_before_a_model_is_loaded(wrong: list[str]) -> None:
    result = run(app, ["trace", "hi", "--model", "no model", "--ledger", "no ledger", *wrong])
    assert wrong[0].removeprefix("--") in f"{result.exception} {result.output}"
    assert "no model" not in f"{result.exception}"
    assert "no ledger" not in f"{result.exception}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_printed_plainly(encoding: str) -> None:
    text = "■ ada ━━╍ · … ⟨U+001B⟩ é 漢 😀 \\ud83d"
    code = f"""
import sys
from protoken.report.encoding import any_encoding
with any_encoding(sys.stdout):
    print("{text}", end="")
print(sys.stdout.errors, end="", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        check=True,
    )
    plain = {
        "ascii": "# ada ==~ - ~ <U+001B> ? ?? ?? ?",
        "latin-1": "# ada ==~ · ~ <U+001B> é ?? ?? ?",
        "cp1252": "# ada ==~ · … <U+001B> é ?? ?? ?",
        "utf-8": "■ ada ━━╍ · … ⟨U+001B⟩ é 漢 😀 ?",
    }
    assert done.stdout.decode(encoding) == plain[encoding]
    assert done.stderr == b"strict"  # as it was


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["models"], ["ledger", "ls", "--json"]], ids=str)
def test_a_full_disk_behind_the_output_is_one_line(folder: Path, command: list[str]) -> None:
    arguments = [*command, *([str(folder / "ledger")] if "ledger" in command else [])]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "protoken", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert own_lines(done.stderr) == ["OSError output: No space left on device"]


def with_nobody_reading(*arguments: str) -> subprocess.CompletedProcess[str]:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        command = [sys.executable, "-m", "protoken", *arguments]
        return subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)


def test_a_closed_pipe_is_not_the_status_of_an_unsound_ledger(folder: Path) -> None:
    done = with_nobody_reading("ledger", "verify", str(folder / "ledger"))
    assert done.returncode == 141
    assert own_lines(done.stderr) == []


def test_files_are_written_before_anybody_stops_reading(folder: Path, tmp_path: Path) -> None:
    asked = ["trace", "hi", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    files = [tmp_path / "t.json", tmp_path / "t.html", tmp_path / "h.html"]
    options = ["--json", str(files[0]), "--html", str(files[1]), "--history", str(files[2]), "--max-new-tokens", "2"]
    done = with_nobody_reading(*asked, *options)
    assert done.returncode == 141, done.stderr
    assert own_lines(done.stderr) == []
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_file_that_cannot_be_written_hides_no_answer(folder: Path) -> None:
    asked = ["trace", "hi", "--model", str(folder / "model"), "--ledger", str(folder / "ledger")]
    result = run(app, [*asked, "--max-new-tokens", "2", "--json", "/dev/full"])
    assert isinstance(result.exception, OSError)
    assert "all scores and the residual together" in result.output
