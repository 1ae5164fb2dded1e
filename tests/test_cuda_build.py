"""nvcc compiles the kernels cleanly, and the machine code holds the instructions that were meant.

Needs nvcc and Triton's own cuobjdump, no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

NVCC = shutil.which("nvcc")
triton = pytest.importorskip("triton", reason="triton brings the cuobjdump that reads the machine code")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
if NVCC is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)
if not CUOBJDUMP.exists():
    pytest.skip(f"{CUOBJDUMP} is not there", allow_module_level=True)

WIDE_LOAD = r"\bLDG\.E[\w.]*\.128"
CSRC = Path(__file__).parents[1] / "csrc"


@cache
def compiled(source: str, architecture: str) -> tuple[str, dict[str, str]]:
    """(the compiler's resource report, SASS by kernel) of a file for one architecture."""
    cubin = Path(mkdtemp()) / "kernels.cubin"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [str(NVCC), "-std=c++17", "-O3", code, "-Xptxas=-v", "-cubin", str(CSRC / source), "-o", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert run.returncode == 0, run.stderr[-4000:]
    dump = subprocess.run([str(CUOBJDUMP), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    pieces = re.split(r"\n\s*Function : (\S+)", dump.stdout)
    return run.stderr, dict(zip(pieces[1::2], pieces[2::2], strict=True))


def kernels_named(sass: dict[str, str], pattern: str) -> list[str]:
    """Code of the kernels whose mangled name has the pattern."""
    found = [code for name, code in sass.items() if re.search(pattern, name)]
    assert found, f"no kernel matches {pattern} in {list(sass)}"
    return found


def spilled(report: str, allowed: int = 0) -> list[str]:
    """Lines of the report with more bytes of spill stores than allowed."""
    found = ((line, re.search(r"(\d+) bytes spill stores", line)) for line in report.splitlines())
    return [line for line, match in found if match and int(match[1]) > allowed]


@pytest.mark.parametrize("format_", ["bf16", "e4m3", "i8", "f32"])
def test_score_kernels_for_hopper_spill_nothing_and_keep_wgmma_asynchronous(format_: str) -> None:
    report, sass = compiled(f"client_scores_{format_}.cu", "90a")
    assert not spilled(report)
    assert "serialized" not in report
    for code in kernels_named(sass, r"client_scores_kernelILi\dELi[13]ELi\d+ELb1ELb1E"):
        assert "HGMMA" in code
        assert "HMMA" not in code


def test_score_kernels_for_hopper_use_warpgroup_products_and_bulk_copies() -> None:
    _, sass = compiled("client_scores_bf16.cu", "90a")
    wide = kernels_named(sass, r"client_scores_kernelILi1ELi1ELi(64|128)ELb1ELb1E")
    for code in wide:
        assert "HGMMA" in code
        assert "HMMA" not in code
        assert "UBLKCP" in code
        assert re.search(WIDE_LOAD, code)
    (narrow,) = kernels_named(sass, r"client_scores_kernelILi1ELi1ELi16ELb1ELb0E")
    assert "HMMA" in narrow
    assert re.search(WIDE_LOAD, narrow)


def test_one_byte_values_are_decoded_while_128_tokens_are_multiplied() -> None:
    report, sass = compiled("client_scores_e4m3.cu", "90a")
    (wide,) = kernels_named(sass, r"client_scores_kernelILi4ELi1ELi128ELb1ELb1E")
    order = re.findall(r"\b(F2FP|HGMMA)\b", wide)
    products = [at for at, name in enumerate(order) if name == "HGMMA"]
    assert len(products) == 16
    for group in range(0, 12, 4):  # while a group of four is multiplied, the next one's sixteen pairs are decoded
        assert order[products[group] : products[group + 4]].count("F2FP") >= 12
    assert "serialized" not in report


def test_score_kernels_for_ampere_use_matrix_units_and_16_byte_loads() -> None:
    _, sass = compiled("client_scores_bf16.cu", "80")
    for code in kernels_named(sass, r"client_scores_kernelILi1ELi1ELi\d+ELb1ELb0E"):
        assert "HMMA.16816.F32.BF16" in code
        assert re.search(WIDE_LOAD, code)
        assert "LDGSTS" in code


def positions(code: str, pattern: str, among: str) -> list[int]:
    """Where the instructions of a pattern stand among those of both patterns, in the loop that streams the bank.

    That loop is the smallest one with a wide load; it ends with a jump back to its first instruction.
    """
    lines = [
        (int(found[1], 16), found[2])
        for line in code.splitlines()
        if (found := re.match(r"\s*/\*(\w{4,})\*/ (.*);", line))
    ]
    loops = []
    for end, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA[.\w]*\s.*?0x(\w+)", text)
        if jump and int(jump[1], 16) <= address:
            body = [text for at, text in lines[: end + 1] if at >= int(jump[1], 16)]
            if any(re.search(WIDE_LOAD, text) for text in body):
                loops.append(body)
    order = [text for text in min(loops, key=len) if re.search(f"{pattern}|{among}", text)]
    return [at for at, text in enumerate(order) if re.search(pattern, text)]


@pytest.mark.parametrize(("source", "number"), [("client_scores_bf16.cu", 1), ("client_scores_e4m3.cu", 4)])
def test_the_next_loads_of_the_bank_are_under_way_while_this_one_is_multiplied(source: str, number: int) -> None:
    _, sass = compiled(source, "90a")
    (narrow,) = kernels_named(sass, rf"client_scores_kernelILi{number}ELi1ELi16ELb1ELb0E")
    loads, products = positions(narrow, WIDE_LOAD, r"\bHMMA"), positions(narrow, r"\bHMMA", WIDE_LOAD)
    assert len(loads) == 8
    assert loads[3] < products[len(products) // 3]
    (wide,) = kernels_named(sass, rf"client_scores_kernelILi{number}ELi1ELi128ELb1ELb1E")
    assert positions(wide, WIDE_LOAD, r"\bHGMMA") == list(range(8))  # all of them before the first product


def test_totals_have_enough_loads_under_way() -> None:
    """Either four blocks share a multiprocessor, 64 KB in all, or the next loads come before the last sums."""
    report, sass = compiled("client_totals.cu", "90a")
    names = re.findall(r"Compiling entry function '(\S+)'", report)
    registers = dict(zip(names, map(int, re.findall(r"Used (\d+) registers", report)), strict=True))
    checked = 0
    for name, code in sass.items():
        if re.search(r"client_totals_kernelILi\dELb1E", name):
            loads = positions(code, WIDE_LOAD, r"\bFFMA")
            sums = positions(code, r"\bFFMA", WIDE_LOAD)
            assert registers[name] <= 64 or loads[-1] < sums[-1]
            checked += 1
    assert checked == 5


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_totals_stream_16_bytes_at_a_time(architecture: str) -> None:
    _, sass = compiled("client_totals.cu", architecture)
    for code in kernels_named(sass, r"client_totals_kernelILi1ELb1E"):
        assert re.search(WIDE_LOAD, code)
        assert "STL" not in code


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_the_head_is_streamed_16_bytes_at_a_time_and_spills_next_to_nothing(architecture: str) -> None:
    report, sass = compiled("relevance_head.cu", architecture)
    assert not spilled(report, allowed=64)  # 48 bytes with four tokens and in fp16's mean
    for code in kernels_named(sass, r"head_once_kernelILi\dELi1E"):
        assert re.search(WIDE_LOAD, code)
        assert "STL" not in code
    for code in kernels_named(sass, r"head_(logits|mean)_kernelILi1ELb1E"):
        assert re.search(WIDE_LOAD, code)
        assert "HMMA.16816.F32.BF16" in code


@pytest.mark.slow
def test_lowrank_kernels_turn_factors_in_registers_and_spill_next_to_nothing() -> None:
    report, sass = compiled("client_scores_lowrank.cu", "90a")
    assert not spilled(report, allowed=64)  # 44 bytes, between the loops, at 64 tokens and 12 warps
    for code in kernels_named(sass, r"lowrank_kernelILi1ELi1ELi64E"):
        assert re.search(WIDE_LOAD, code)
        for instruction in ("MOVM.16.MT88", "HMMA.16816.F32.BF16", "LDGSTS"):
            assert instruction in code


@pytest.mark.slow
def test_kernels_compile_for_blackwell() -> None:
    report, sass = compiled("client_scores_bf16.cu", "100")
    assert sass
    assert "error" not in report


def test_no_kernel_adds_floats_atomically() -> None:
    sources = "client_scores.cu", "client_totals.cu", "client_scores_bf16.cu", "relevance_head.cu", "capture_append.cu"
    for source in sources:
        _, sass = compiled(source, "90a")
        for name, code in sass.items():
            assert not re.search(r"\b(RED|ATOM|ATOMG)\.", code), name
