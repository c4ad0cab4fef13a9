"""The `heedful` command: what each subcommand prints, and that what goes wrong is one line and a status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import heedful
import oracle
from heedful import LLM, SamplingParams
from heedful.cli import doctor, generate, main

COMMANDS = ["generate", "bench", "inspect", "doctor"]


def heedful_command(*arguments: str | Path, stdin: bytes = b"", before: str = "") -> subprocess.CompletedProcess[bytes]:
    """Runs the command in a process of its own; `before` is run there first."""
    code = f"import sys\n{before}\nfrom heedful.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], input=stdin, capture_output=True)


def assert_fails(result: subprocess.CompletedProcess[bytes], *parts: str) -> None:
    """Status 1, nothing on standard output, one line on standard error that holds the parts."""
    error = result.stderr.decode()
    assert (result.returncode, result.stdout) == (1, b""), error
    assert error.startswith("heedful: error: ")
    assert len(error.splitlines()) == 1, error
    for part in parts:
        assert part in error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    oracle.save("glm_moe_dsa", directory)
    return directory


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with tensors left out or configuration changed."""

    def damage(*without: str, **changes: Any) -> Path:
        values = json.loads((checkpoint / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        state = load_file(checkpoint / "model.safetensors")
        save_file({name: t for name, t in state.items() if name not in without}, tmp_path / "model.safetensors")
        return tmp_path

    return damage


# The command itself.


@pytest.mark.parametrize("command", [["-m", "heedful"], ["-c", "from heedful.cli import main; main()"]])
def test_version(command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == (f"heedful {heedful.__version__}\n", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_tells_of_everything_and_imports_no_torch(command: str) -> None:
    before = """
import atexit
atexit.register(lambda: print(*sorted(sys.modules.keys() & {"torch", "tqdm", "safetensors", "triton"}), "loaded"))"""
    result = heedful_command(*command.split(), "--help", before=before)
    text = result.stdout.decode()
    assert (result.returncode, result.stderr) == (0, b"")
    assert text.startswith(f"usage: heedful {command}".rstrip())
    assert text.splitlines()[-1] == "loaded"
    for word in COMMANDS if not command else ["--debug"]:
        assert word in text
    assert "None" not in text
    assert "default: []" not in text


def test_help_of_generate_tells_defaults_that_say_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "keep this many tokens; 0 keeps all (default: 0)",
        "repeatable (default: 0)",
        "at most (default: 256)",
    ):
        assert part in text
    assert "checkpoint directory (default: the small built-in model) --" in text
    assert "print the text alone --" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
        (["generate", "text", "--file", "x"], "not allowed with"),
        (["generate", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "--attention", "linear"], "--attention"),
        (["doctor", "--what"], "--what"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("place", ["before", "behind"])
def test_debug_shows_the_traceback_wherever_it_stands(place: str) -> None:
    command = ["--debug", "inspect", "nowhere"] if place == "before" else ["inspect", "nowhere", "--debug"]
    result = heedful_command(*command)
    assert result.returncode == 1
    assert b"Traceback" in result.stderr
    assert b"FileNotFoundError" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["doctor"]], ids=" ".join)
def test_a_closed_pipe_ends_it_without_a_word(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "heedful", *arguments]
        result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert result.stderr == b""
    assert result.returncode in (0, 1)  # argparse does not look whether its help arrives


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main(["doctor"]) == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


# inspect


def test_inspect_prints_what_a_checkpoint_holds(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    captured = capsys.readouterr()
    lines = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert lines[0] == str(checkpoint)
    assert lines[-1].startswith("No problems")
    assert captured.err == ""
    assert {
        "model_type glm_moe_dsa",
        "indexer 16 heads x 32, top 24 keys, 2 full (layers 0, 2), 2 shared",
        "MLP 1 dense (layer 0), 3 sparse",
        "MoE 3 of 8 experts of width 32 + 1 shared; 1 of 1 groups",
        "RoPE theta 10000, YaRN x8 of 64",
        "float32 160 + 128 bytes; 896 bytes a token; 448.00 KiB",
        "fp8 52 + 36 bytes; 280 bytes a token; 140.00 KiB",
    } <= set(lines)


def test_inspect_gives_the_same_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    state = load_file(checkpoint / "model.safetensors")
    total = sum(tensor.numel() for tensor in state.values())
    idle = sum(t.numel() for name, t in state.items() if ".experts." in name) // 8 * 5
    assert report["parameters"]["total"] == sum(report["parameters"]["parts"].values()) == total
    assert report["parameters"]["active_per_token"] == total - idle
    assert report["files"] == {"model.safetensors": (checkpoint / "model.safetensors").stat().st_size}
    assert sum(values["bytes"] for values in report["dtypes"].values()) == 4 * total
    assert report["config"]["index_topk"] == 24
    assert report["cache"]["float32"]["bytes_at_max_context"] == 896 * 512
    assert report["problems"] == []


def test_inspect_of_a_config_alone_says_nothing_about_files(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint / "config.json")]) == 0
    out = capsys.readouterr().out
    assert "Parameters" in out
    assert "Weights" not in out
    assert "problem" not in out.lower()


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_inspect_of_a_damaged_checkpoint_names_the_problem(
    as_json: bool, damaged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = damaged("model.norm.weight")
    assert main(["inspect", str(directory), *["--json"] * as_json]) == 1
    out = capsys.readouterr().out
    assert "missing tensors: 'model.norm.weight'" in (json.loads(out)["problems"][0] if as_json else out)
    (directory / "model.safetensors").write_bytes(b"\xff" * 100)
    assert main(["inspect", str(directory)]) == 1
    assert "model.safetensors: header length: expected at most" in capsys.readouterr().out
    (directory / "model.safetensors").unlink()
    assert main(["inspect", str(directory)]) == 1
    assert "neither model.safetensors nor model.safetensors.index.json" in capsys.readouterr().out


def test_inspect_leaves_out_caches_that_a_model_cannot_have(
    damaged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(damaged(index_head_dim=96) / "config.json"), "--json"])
    assert list(json.loads(capsys.readouterr().out)["cache"]) == ["float32", "bfloat16"]


def test_inspect_refuses_a_bad_configuration(damaged: Callable[..., Path]) -> None:
    assert_fails(heedful_command("inspect", damaged(index_topk=0)), "config.json: index_topk: expected a positive")
    assert_fails(heedful_command("inspect", damaged() / "nowhere"), "nowhere", "No such file or directory")


def test_inspect_warns_in_one_line_of_unknown_keys(damaged: Callable[..., Path]) -> None:
    result = heedful_command("inspect", damaged(new_setting=1) / "config.json")
    assert result.stderr.decode() == "heedful: warning: config.json: unknown keys are ignored: 'new_setting'\n"
    assert result.returncode == 0


def test_inspect_needs_no_torch(checkpoint: Path) -> None:
    before = "sys.modules['torch'] = sys.modules['safetensors'] = None"
    result = heedful_command("inspect", checkpoint, before=before)
    assert (result.returncode, result.stderr) == (0, b"")


# doctor


def test_doctor_prints_what_works_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ")}
    assert heedful.__version__ in lines["heedful"]
    assert " ok " in lines["CPU operators"]
    assert heedful._core.simd_level() in lines["CPU operators"]
    assert f"{heedful.get_num_threads()} threads" in lines["CPU operators"]
    assert " ok " in lines["LLM, heedful.nn"]
    assert " ok " in lines["Triton"]
    assert out.splitlines()[-1].startswith("Backend: ")
    if not torch.cuda.is_available():
        assert out.splitlines()[-1] == "Backend: cpu (torch sees no GPU)"


def test_doctor_gives_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu_works"] is True
    assert report["backend"]["name"] == ("triton" if torch.cuda.is_available() else "cpu")
    assert report["checks"]["CPU operators"]["status"] == "ok"
    assert report["machine"]["usable_cores"] >= 1
    assert {check["status"] for check in report["checks"].values()} <= {"ok", "missing", "failed", "unused"}


def test_doctor_works_without_torch() -> None:
    result = heedful_command("doctor", "--json", before="sys.modules['torch'] = sys.modules['safetensors'] = None")
    report = json.loads(result.stdout)
    assert result.returncode == 0
    for name in ("LLM, heedful.nn", "checkpoints"):
        assert report["checks"][name]["status"] == "missing"
        assert "pip install 'heedful[torch]'" in report["checks"][name]["detail"]
    assert report["checks"]["CPU operators"]["status"] == "ok"


def test_doctor_tells_of_a_torch_that_does_not_work() -> None:
    before = "import types; sys.modules['torch'] = types.ModuleType('torch')"
    report = json.loads(heedful_command("doctor", "--json", before=before).stdout)
    assert report["checks"]["LLM, heedful.nn"]["status"] == "failed"
    assert "AttributeError" in report["checks"]["LLM, heedful.nn"]["detail"]


def test_doctor_says_what_the_environment_has_set() -> None:
    before = "import os; os.environ.update(HEEDFUL_SIMD='portable', HEEDFUL_NUM_THREADS='1')"
    detail = json.loads(heedful_command("doctor", "--json", before=before).stdout)["checks"]["CPU operators"]["detail"]
    assert "portable (set by HEEDFUL_SIMD), 1 threads (set by HEEDFUL_NUM_THREADS)" in detail


@pytest.mark.parametrize("how", ["raises", "is_wrong"])
def test_doctor_has_status_1_when_the_operators_do_not_work(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse_attention = heedful.ops.sparse_attention

    def broken(*args: Any, **kwargs: Any) -> Any:
        if how == "raises":
            raise RuntimeError("illegal instruction")
        out, lse = sparse_attention(*args, **kwargs)
        return (out if kwargs.get("backend") == "reference" else out + 1), lse

    monkeypatch.setattr(heedful.ops, "sparse_attention", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert ("RuntimeError: illegal instruction" if how == "raises" else "operators differ from the references") in out


@pytest.mark.parametrize(
    ("triton", "kernels", "parts"),
    [
        ("ok", "ok", ["Backend: triton (NVIDIA A100 (SM80) runs the Triton kernels)"]),
        ("ok", "raises", ["failed   RuntimeError: no kernel image", "Backend: triton (NVIDIA A100 (SM80), although"]),
        (
            "missing",
            "ok",
            ["unused   its kernels need Triton", "Backend: cpu (NVIDIA A100 is there, but Triton"],
        ),
    ],
)
def test_doctor_names_gpus_and_what_runs_on_them(
    triton: str, kernels: str, parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"name": "NVIDIA A100", "memory_bytes": 80 * 2**30, "architecture": "SM80"}

    def compare(found: dict[str, Any]) -> dict[str, str]:
        assert found is gpu
        if kernels == "raises":
            raise RuntimeError("no kernel image")
        return {"status": "ok", "detail": "kernels agree with the CPU"}

    monkeypatch.setattr(doctor, "_check_torch", lambda: ({"status": "ok", "detail": "torch"}, [gpu]))
    monkeypatch.setattr(doctor, "_check_triton", lambda: {"status": triton, "detail": "triton"})
    monkeypatch.setattr(doctor, "_compare_on_gpu", compare)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA A100 (SM80), 80.00 GiB" in out
    for part in parts:
        assert part in out


# generate: what goes wrong


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["text", "--model", "no/such/model"], "model: expected a directory"),
        (["--file", "no/such/file"], "no/such/file: No such file or directory"),
        (["text", "--max-tokens", "0"], "max_tokens: expected an integer of at least 1, got 0"),
        (["text", "--temperature", "nan"], "temperature: expected a finite number"),
        (["text", "--temperature", "-1"], "temperature: expected a finite number"),
        (["text", "--top-p", "0"], "top_p: expected a finite number"),
        (["text", "--min-p", "2"], "min_p: expected a finite number"),
        (["text", "--top-k", "-1"], "top_k: expected an integer of at least 0"),
        (["text", "--seed", "-1"], "seed: expected an integer from 0"),
        (["text", "--stop", ""], "stop: expected non-empty strings"),
        (["text", "--repetition-penalty", "0"], "repetition_penalty: expected"),
        (["text", "--threads", "0"], "--threads: expected 1 to 1024, got 0"),
        (["text", "--kv-cache-tokens", "0"], "kv_cache_tokens: expected a positive integer, got 0"),
        (["text", "--device-latent-tokens", "64"], "device_latent_tokens: expected at least 4480 with"),
        (["text", "--max-batched-tokens", "-1"], "max_batched_tokens: expected a positive integer, got -1"),
        (["text", "--max-model-len", str(10**30)], "max_model_len: expected at most"),
    ],
    ids=" ".join,
)
def test_generate_names_a_bad_argument_in_one_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("heedful: error: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err


def test_generate_refuses_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"fine until \xff")
    assert_fails(heedful_command("generate", "--file", tmp_path / "bytes"), "bytes: expected UTF-8 text", "0xff")
    assert_fails(heedful_command("generate", stdin=b"\xc3"), "standard input: expected UTF-8 text")
    assert_fails(heedful_command("generate", os.fsdecode(b"\xff")), "prompt: expected UTF-8 text")
    assert_fails(heedful_command("generate", "--file", tmp_path), "Is a directory")


def test_generate_refuses_an_endless_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "MAX_PROMPT_BYTES", 1000)
    assert main(["generate", "--file", "/dev/zero"]) == 1
    assert capsys.readouterr().err == "heedful: error: --file: /dev/zero: expected at most 1000 bytes\n"


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_generate_tells_how_to_get_what_is_missing(name: str, checkpoint: Path) -> None:
    result = heedful_command("generate", "text", "--model", checkpoint, before=f"sys.modules['{name}'] = None")
    assert_fails(result, f"needs {name}: pip install 'heedful[torch]'")


def test_generate_of_a_damaged_checkpoint_names_the_problem(
    damaged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "text", "--model", str(damaged("lm_head.weight"))]
    assert main(command) == 1
    assert capsys.readouterr().err == "heedful: error: missing tensors: 'lm_head.weight'\n"
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        main([*command, "--debug"])


def test_generate_of_a_checkpoint_without_a_tokenizer_says_so(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "text", "--model", str(checkpoint), "--kv-cache-tokens", "64"]) == 1
    assert "this model has no tokenizer" in capsys.readouterr().err


def test_generate_with_weights_that_make_nan_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nan(*args: object, **kwargs: object) -> None:
        raise FloatingPointError("logits: expected finite numbers")

    monkeypatch.setattr(generate, "_stream", nan)
    assert main(["generate", "text", "--kv-cache-tokens", "64"]) == 1
    assert capsys.readouterr().err == "heedful: error: logits: expected finite numbers\n"


# generate: what goes right, on the built-in model

PROMPT = "The first thing to know about this"
QUICK = ["--max-tokens", "12", "--kv-cache-tokens", "1024"]


@pytest.fixture(scope="module")
def expected() -> str:
    """What greedy decoding gives."""
    llm = LLM(kv_cache_tokens=1024)
    output = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12), progress=False)[0]
    return output.outputs[0].text


def test_generate_prints_the_text_and_the_measures_apart(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, *QUICK, "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    error = captured.err
    names = ("prompt:", "generated:", "time to first token:", "decode:", "share of keys read:", "latent cache:")
    for name in names:
        assert name in error
    assert "12 tokens, ended by length" in error
    assert expected not in error


def test_generate_with_latent_rows_on_the_host(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device-latent-tokens", "576", "--max-batched-tokens", "64"]
    assert main(["generate", PROMPT, *QUICK, *options, "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    assert re.search(r"latent cache: .* MiB on the device, .* MiB on the host; 0 rows fetched", captured.err)


def test_generate_quiet_reads_standard_input_and_prints_the_text_alone(expected: str) -> None:
    result = heedful_command("generate", *QUICK, "--temperature", "0", "--quiet", stdin=PROMPT.encode())
    assert (result.returncode, result.stdout.decode(), result.stderr) == (0, expected + "\n", b"")


def test_generate_reads_a_file(expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert main(["generate", "--file", str(file), *QUICK, "--temperature", "0", "--quiet"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_generate_repeats_a_seed_and_varies_with_another(capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: str) -> str:
        assert main(["generate", PROMPT, *QUICK, "--quiet", *options]) == 0
        return capsys.readouterr().out

    assert text() == text("--seed", "0") != text("--seed", "1")


def test_generate_streams_pieces_that_add_up(
    expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(generate, "print", lambda text="", **options: pieces.append(text), raising=False)
    assert main(["generate", PROMPT, *QUICK, "--temperature", "0", "--quiet"]) == 0
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 3


def test_generate_ends_at_a_stop_text(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = expected[len(expected) // 2 :][:4]
    assert main(["generate", PROMPT, *QUICK, "--temperature", "0", "--quiet", "--stop", stop]) == 0
    assert capsys.readouterr().out == expected[: expected.find(stop)] + "\n"


def test_generate_refuses_an_empty_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "", *QUICK]) == 1
    assert "prompt: expected at least one token" in capsys.readouterr().err


def test_generate_ends_quietly_when_its_reader_goes() -> None:
    command = f"{sys.executable} -m heedful generate '{PROMPT}' --max-tokens 40 --kv-cache-tokens 1024 --quiet"
    script = f"({command}; echo status $? >&2) | head -c 1"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.stderr == "status 1\n"
