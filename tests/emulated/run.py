"""The CPU kernels on processors that this machine is not: in Bochs, an emulator.

Builds check_ops.cpp with the kernels as the package has them, runs it here, then boots it in the emulator with
kernel.c in place of an operating system: as a Sapphire Rapids, with AVX-512 and AMX, and as a processor without AVX.
Fails unless each chose among the instruction sets that it has, every op was right under every one of them, and a set
left the same bits everywhere. Minutes; what it says is about numbers, not about speed.

    python tests/emulated/run.py [--out out/emulated] [--bochs bochs]

Needs Bochs 3.0, configured with --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx
--with-nogui, and Debian's bochsbios, vgabios, grub-pc-bin, xorriso and mtools. An exit status of 77 says that something
is not there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VIDEO_BIOS = Path("/usr/share/vgabios/vgabios.bin")
SKIPPED = 77
OPS = ("scores and totals", "low rank", "head")
# What each processor has to choose from: the newest of all, and one from before AVX.
MODELS = {
    "sapphire_rapids": {"portable", "avx2", "avx512", "avx512-bf16", "amx", "amx-emulated"},
    "corei5_lynnfield_750": {"portable"},
}
RESULT = re.compile(r"^(?P<set>[\w-]+), (?P<what>[\w ]+): .* (?P<wrong>\d+) wrong, .* bits (?P<bits>[0-9a-f]+)$", re.M)

MACHINE = """\
config_interface: textconfig
display_library: nogui
cpu: model={model}, ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file={bios}
vgaromimage: file={video_bios}
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={disc}, status=inserted
boot: cdrom
port_e9_hack: enabled=1
log: {log}
panic: action=fatal
"""
MENU = """\
set timeout=0
menuentry check_ops {
  multiboot /boot/kernel
  module /boot/check_ops
}
"""


def run(*command: str | Path, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def build(out: Path) -> Path:
    """check_ops and kernel, and a disc that boots them."""
    boot = out / "disc" / "boot"
    (boot / "grub").mkdir(parents=True, exist_ok=True)
    options = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run("cmake", "-S", ROOT, "-B", out / "build", *options, "-DPROTOKEN_CUDA=0", "--log-level=WARNING")
    run("cmake", "--build", out / "build", "--target", "check_ops", "--parallel", "2")
    shutil.copy(out / "build" / "check_ops", boot)
    flags = ("-O1", "-Wall", "-Wextra", "-ffreestanding", "-mgeneral-regs-only", "-mno-red-zone", "-fno-pic")
    run("cc", *flags, "-fno-stack-protector", "-c", HERE / "kernel.c", "-o", out / "kernel.o")
    run("cc", "-c", HERE / "boot.S", "-o", out / "boot.o")
    parts = (out / "boot.o", out / "kernel.o")
    run("ld", "-n", "--no-warn-rwx-segments", "-T", HERE / "kernel.ld", "-o", boot / "kernel", *parts)
    (boot / "grub" / "grub.cfg").write_text(MENU, encoding="utf-8")
    disc = out / "disc.iso"
    run("grub-mkrescue", "-o", disc, out / "disc", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return disc


def emulate(bochs: str, model: str, disc: Path, out: Path) -> str:
    """What the program printed on that processor; it is shown while it comes."""
    machine = out / f"{model}.bochsrc"
    settings = {"model": model, "bios": BIOS, "video_bios": VIDEO_BIOS, "disc": disc, "log": out / f"{model}.log"}
    machine.write_text(MACHINE.format(**settings), encoding="utf-8")
    printed = ""
    command = [bochs, "-q", "-f", str(machine)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if RESULT.match(line) or line.startswith(("WRONG", "exception", "exit", "instruction")):
                print(line, end="", flush=True)
    return printed


def results(printed: str) -> dict[tuple[str, str], tuple[int, str]]:
    """(set, ops) -> (number wrong, hash of all bits)."""
    return {(m["set"], m["what"]): (int(m["wrong"]), m["bits"]) for m in RESULT.finditer(printed)}


def missing(bochs: str) -> list[str]:
    """What has to be installed first."""
    tools = ("cmake", "cc", "ld", "grub-mkrescue", "xorriso", "mformat", bochs)
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    lacking += [str(file) for file in (BIOS, VIDEO_BIOS) if not file.exists()]
    if bochs not in lacking:
        asked = subprocess.run([bochs, "--help", "cpu"], capture_output=True, encoding="utf-8", check=False)
        lacking += [f"{bochs} with a model {model}" for model in MODELS if model not in asked.stdout + asked.stderr]
    return lacking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/emulated"))
    parser.add_argument("--bochs", default="bochs")
    asked = parser.parse_args()
    # cmake may be installed beside this Python only.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    lacking = missing(asked.bochs)
    if lacking:
        print(f"not there: {', '.join(lacking)}; see the top of {Path(__file__).resolve().relative_to(ROOT)}")
        return SKIPPED
    out = asked.out.resolve()
    disc = build(out)
    here = subprocess.run([out / "build" / "check_ops"], stdout=subprocess.PIPE, encoding="utf-8", check=False).stdout
    print(f"here\n{here}", flush=True)
    known = results(here)
    faults = [f"here, {key}: {wrong} wrong" for key, (wrong, _) in known.items() if wrong]
    for model, sets in MODELS.items():
        print(model)
        found = results(emulate(asked.bochs, model, disc, out))
        expected = {(name, ops) for name in sets for ops in OPS}
        if found.keys() != expected:
            faults.append(f"{model}: other sets or ops than expected: {sorted(found.keys() ^ expected)}")
        faults += [f"{model}, {key}: {wrong} wrong" for key, (wrong, _) in found.items() if wrong]
        # The head takes exp from the C library, which has several, one per kind of processor.
        others = [key for key in found if key[1] != "head" and known.get(key, found[key]) != found[key]]
        faults += [f"{model}, {key}: other bits than before" for key in others]
        known = found | known
    print("\n".join(faults) or "all sets right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
