"""The CUDA kernels, compiled as C++ with one fiber per thread, against the fp64 references.

What this shows without a GPU: which element every lane loads, how fragments, descriptors and images are laid out,
how work is cut into units, and that barriers are met. csrc/cuda_emulation.h says what it does not show.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from protoken import dispatch
from protoken.dispatch import OPS

pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the emulated kernels")
COMPILER = shutil.which("g++")
if COMPILER is None:
    pytest.skip("g++ is needed to build the emulated kernels", allow_module_level=True)

ROOT = Path(__file__).parents[1]
NAME = "_C_cuda_emulated"
SOURCES = ["cuda_bindings.cpp", "cuda_device.cpp", "client_scores.cu", "client_scores_lowrank.cu", "client_totals.cu"]
SOURCES += ["relevance_head.cu", "capture_append.cu"]
SOURCES += [f"client_scores_{name}.cu" for name in ("bf16", "e4m3", "f16", "f32", "half", "i8")]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-DPROTOKEN_EMULATE",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
]
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
RMS = 3e-6  # products are exact, sums are fp32


def build(folder: Path) -> Path:
    """Compile the kernels once per state of the sources."""
    target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: str) -> str:
        made = str(folder / f"{source}.o")
        command = [str(COMPILER), *FLAGS, *includes, "-x", "c++", "-c", str(ROOT / "csrc" / source), "-o", made]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    half_made = folder / f"{NAME}.part"
    subprocess.run([str(COMPILER), "-shared", "-o", str(half_made), *objects], check=True)
    half_made.rename(target)
    return target


def load(name: str, path: Path, loader: type | None = None) -> ModuleType:
    chosen = loader(name, str(path)) if loader else None
    spec = importlib.util.spec_from_file_location(name, path, loader=chosen)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cuda() -> Iterator[ModuleType]:
    """A copy of protoken.ops.cuda over the emulated module."""
    import protoken

    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").glob("*.c*")) + sorted((ROOT / "csrc").glob("cuda_*")):
        digest.update(path.read_bytes())
    digest.update(sys.version.encode())
    target = build(Path(tempfile.gettempdir()) / f"protoken-emulation-{digest.hexdigest()[:16]}")
    emulated = load(NAME, target, importlib.machinery.ExtensionFileLoader)
    before, had = sys.modules.get("protoken._C_cuda"), getattr(protoken, "_C_cuda", None)
    sys.modules["protoken._C_cuda"] = emulated
    protoken._C_cuda = emulated
    try:
        yield load("emulated_cuda_backend", ROOT / "protoken" / "ops" / "cuda.py")
    finally:
        if before is None:
            del sys.modules["protoken._C_cuda"]
        else:
            sys.modules["protoken._C_cuda"] = before
        if had is None:
            del protoken._C_cuda
        else:
            protoken._C_cuda = had


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bank_of(name: str, clients: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    if name == "int8":
        generator = torch.Generator().manual_seed(3)
        bank = torch.randint(-128, 128, (clients, rows, columns), generator=generator, dtype=torch.int8)
    else:
        bank = normal(clients, rows, columns, seed=3, dtype=DTYPES[name])
    return bank, normal(clients, rows, seed=4).abs() + 0.1 if name in ("int8", "fp8") else None


def assert_close(got: Tensor, reference: Tensor) -> None:
    assert got.shape == reference.shape
    error = float((got.double() - reference.double()).norm() / reference.double().norm())
    assert error <= RMS, f"relative RMS error {error:.2e}, allowed {RMS:.0e}"


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


@pytest.mark.parametrize("tokens_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize(
    ("clients", "tokens", "rows", "columns"), [(3, 1, 70, 64), (5, 20, 65, 272), (1, 70, 64, 48), (2, 7, 63, 61)]
)
@pytest.mark.parametrize("path", [0, 1], ids=["auto", "mma"])
def test_client_scores(
    cuda: ModuleType, name: str, tokens_dtype: str, clients: int, tokens: int, rows: int, columns: int, path: int
) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    x = normal(tokens, columns, seed=1, dtype=DTYPES[tokens_dtype])
    grad = normal(tokens, rows, seed=2, dtype=DTYPES[tokens_dtype])
    bank, scale = bank_of(name, clients, rows, columns)
    out = poisoned(1, clients, tokens)
    cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank, scale)], path=path)
    assert_close(out[0], client_scores_reference(x, grad, bank, scale=scale))


@pytest.mark.parametrize("tokens", [3, 100], ids=["narrow", "wide"])
def test_client_scores_over_several_chunks_units_and_blocks(cuda: ModuleType, tokens: int) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    x, grad = (normal(tokens, n, seed=n, dtype=torch.bfloat16) for n in (1160, 130))
    bank = normal(2, 130, 1160, seed=3, dtype=torch.bfloat16)
    out = poisoned(1, 2, tokens)
    cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank)])
    assert_close(out[0], client_scores_reference(x, grad, bank))


def test_client_scores_of_layers_of_two_shapes_with_clients_apart(cuda: ModuleType) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    shapes = [(24, 40), (72, 24), (24, 40)]
    xs = [normal(6, columns, seed=10 + n) for n, (_, columns) in enumerate(shapes)]
    grads = [normal(6, rows, seed=20 + n).T.contiguous().T for n, (rows, _) in enumerate(shapes)]
    parts = [[normal(*shape, seed=100 * n + k) for k in range(3)] for n, shape in enumerate(shapes)]
    out = poisoned(3, 3, 6)
    cuda.launch_client_scores(out, xs, grads, [DenseBank.of(part) for part in parts])
    for n in range(3):
        assert_close(out[n], client_scores_reference(xs[n], grads[n], torch.stack(parts[n])))


@pytest.mark.parametrize("columns", [40, 33], ids=["aligned", "odd"])
def test_client_scores_of_a_transposed_bank_and_of_every_other_client(cuda: ModuleType, columns: int) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    x, grad = normal(7, columns, seed=1), normal(7, 24, seed=2)
    bank = normal(6, columns, 24, seed=3).transpose(1, 2)[::2]
    out = poisoned(1, 3, 7)
    cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank)])
    assert_close(out[0], client_scores_reference(x, grad, bank))


@pytest.mark.parametrize("tokens", [5, 40])
def test_client_scores_do_not_depend_on_the_order_or_the_number_of_clients(cuda: ModuleType, tokens: int) -> None:
    from protoken.ops import DenseBank

    x, grad, bank = normal(tokens, 80, seed=1), normal(tokens, 200, seed=2), normal(5, 200, 80, seed=3)
    order = torch.tensor([4, 1, 0, 3, 2])
    outs = []
    for chosen in (bank, bank[order], bank[:2]):
        out = poisoned(1, chosen.shape[0], tokens)
        cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(chosen)])
        outs.append(out[0])
    assert torch.equal(outs[0][order], outs[1])
    assert torch.equal(outs[0][:2], outs[2])


def test_null_client_scores_exactly_zero(cuda: ModuleType) -> None:
    from protoken.ops import DenseBank

    bank = normal(3, 64, 64, seed=3)
    bank[1] = 0
    out = poisoned(1, 3, 4)
    cuda.launch_client_scores(out, [normal(4, 64, seed=1)], [normal(4, 64, seed=2)], [DenseBank.of(bank)])
    assert torch.equal(out[0, 1], torch.zeros(4))


@pytest.mark.parametrize("path", [1, 2], ids=["whole", "split"])
@pytest.mark.parametrize("stored", ["rank-last", "rank-first"])
@pytest.mark.parametrize(
    ("name", "tokens_dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "bf16")]
)
@pytest.mark.parametrize(
    ("clients", "tokens", "rows", "columns", "rank"),
    [(20, 5, 72, 136, 8), (5, 20, 65, 61, 3), (3, 1, 64, 64, 64), (7, 9, 40, 56, 2), (9, 2, 24, 17, 1)],
)
def test_client_scores_lowrank(
    cuda: ModuleType,
    name: str,
    tokens_dtype: str,
    stored: str,
    path: int,
    clients: int,
    tokens: int,
    rows: int,
    columns: int,
    rank: int,
) -> None:
    from protoken.ops import LowRankBank, client_scores_lowrank_reference

    x = normal(tokens, columns, seed=1, dtype=DTYPES[tokens_dtype])
    grad = normal(tokens, rows, seed=2, dtype=DTYPES[tokens_dtype])
    a = normal(clients, rank, columns, seed=3, dtype=DTYPES[name])
    b = normal(clients, rows, rank, seed=4, dtype=DTYPES[name])
    if stored == "rank-first":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    scale = normal(clients, seed=5).abs() + 0.5
    out = poisoned(1, clients, tokens)
    cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b, scale)], path=path)
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b, scale))


def test_client_scores_lowrank_is_the_same_bits_whole_or_split_and_for_any_clients(cuda: ModuleType) -> None:
    from protoken.ops import LowRankBank

    x, grad = normal(5, 1100, seed=1), normal(5, 200, seed=2)
    a, b = normal(20, 8, 1100, seed=3), normal(20, 200, 8, seed=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    outs = []
    for path, chosen in ((1, slice(None)), (2, slice(None)), (1, order), (2, slice(0, 3))):
        out = poisoned(1, a[chosen].shape[0], 5)
        cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a[chosen], b[chosen])], path=path)
        outs.append(out[0])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0][order], outs[2])
    assert torch.equal(outs[0][:3], outs[3])


def test_client_scores_lowrank_of_mixed_ranks_and_layouts(cuda: ModuleType) -> None:
    from protoken.ops import LowRankBank, client_scores_lowrank_reference

    x, grad = normal(4, 56, seed=1), normal(4, 40, seed=2)
    ranks = [4, 1, 0, 17, 4, 64]
    a = [normal(rank, 56, seed=10 + k) for k, rank in enumerate(ranks)]
    b = [normal(40, rank, seed=20 + k) for k, rank in enumerate(ranks)]
    b[4] = b[4].T.contiguous().T
    out = poisoned(1, 6, 4)
    cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b)])
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b))
    assert torch.equal(out[0, 2], torch.zeros(4))


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize(("clients", "rows", "columns"), [(1, 1, 1), (70, 5, 7), (3, 70, 64), (2, 130, 352)])
def test_client_totals(cuda: ModuleType, name: str, clients: int, rows: int, columns: int) -> None:
    from protoken.ops import DenseBank, client_totals_reference

    bank, scale = bank_of(name, clients, rows, columns)
    ms = [normal(rows, columns, seed=1), normal(columns, rows, seed=2).T]
    turned = bank.transpose(1, 2).contiguous().transpose(1, 2)
    out = poisoned(2, clients)
    cuda.launch_client_totals(out, ms, [DenseBank.of(bank, scale), DenseBank.of(turned, scale)])
    for n in range(2):
        assert_close(out[n], client_totals_reference(ms[n], bank, scale=scale))


def test_calls_beyond_the_limits_of_a_launch_are_refused_before_anything_is_allocated(cuda: ModuleType) -> None:
    from protoken.errors import ArgumentError
    from protoken.ops import DenseBank

    bank = DenseBank.of(torch.ones(1, 1, 8))
    many = (1 << 20) + 1  # one tile of 16 tokens more than the grid's second dimension takes, at any stride
    xs, grads = [torch.ones(1, 8).expand(many, 8)], [torch.ones(1, 1).expand(many, 1)]
    odd = DenseBank.of(torch.ones(1, 1, 16)[:, :, ::2])
    with pytest.raises(ArgumentError, match="65535 tiles of 16 tokens"):
        cuda.launch_client_scores(torch.empty(1, 1, many), xs, grads, [odd])
    crowd = DenseBank.of(torch.ones(1, 1, 4).expand(65535 * 64 + 1, 1, 4))
    with pytest.raises(ArgumentError, match="4194240 clients"):
        cuda.launch_client_totals(torch.empty(1, crowd.clients), [torch.ones(1, 4)], [crowd])
    out = poisoned(1, 1, 2)
    cuda.launch_client_scores(out, [torch.ones(2, 8)], [torch.ones(2, 1)], [bank])
    assert torch.equal(out, torch.full((1, 1, 2), 8.0))


# Read once: teams of one warp and of many, one row per team and several tiles; read twice: stages and splits.
HEAD_SHAPES = [(1, 64, 300), (3, 136, 701), (4, 1040, 90), (2, 8, 5), (7, 264, 333), (40, 72, 200), (1, 33, 500)]


def head_case(
    tokens: int, width: int, vocabulary: int, name: str = "fp32", *, nested: bool = False, **options: object
) -> tuple[Tensor, Tensor, object]:
    from protoken.ops import Head

    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(5))
    weight = (normal(vocabulary, width, seed=1) / width**0.5).to(DTYPES[name])
    if nested:
        weight = torch.stack([weight, weight], -1)[..., 0]
    return normal(tokens, width, seed=2, dtype=DTYPES[name]) * 3, targets, Head(weight, **options)  # type: ignore[arg-type]


def head_of(cuda: ModuleType, hidden: Tensor, targets: Tensor, head: object, **options: int) -> tuple[Tensor, Tensor]:
    outs = poisoned(*hidden.shape), poisoned(hidden.shape[0])
    cuda.launch_relevance_head(*outs, hidden, targets, head, **options)
    return outs


def assert_head(cuda: ModuleType, hidden: Tensor, targets: Tensor, head: object, **options: int) -> None:
    from protoken.ops import relevance_head_reference

    got = head_of(cuda, hidden, targets, head, **options)
    for left, right in zip(got, relevance_head_reference(hidden, targets, head), strict=True):  # type: ignore[arg-type]
        assert_close(left, right)


@pytest.fixture
def poisoned_workspace(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory arrives as NaN, so that a part nobody wrote shows."""
    real = cuda._workspace
    monkeypatch.setattr(cuda, "_workspace", lambda size, device: real(size, device).fill_(255))


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.parametrize("path", [0, 2], ids=["auto", "twice"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), HEAD_SHAPES)
def test_relevance_head(cuda: ModuleType, name: str, tokens: int, width: int, vocabulary: int, path: int) -> None:
    norm, softcap = ("rms", None) if width % 16 else ("layer", 2.0)
    hidden, targets, head = head_case(
        tokens,
        width,
        vocabulary,
        name,
        norm=norm,
        softcap=softcap,
        bias=normal(vocabulary, seed=3, dtype=DTYPES[name]),
        norm_weight=normal(width, seed=4, dtype=DTYPES[name]),
        norm_bias=normal(width, seed=6) if norm == "layer" else None,
        scale=0.7,
    )
    assert_head(cuda, hidden, targets, head, path=path)


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.parametrize("path", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("objective", ["logprob", "logit"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bare"])
def test_relevance_head_of_every_norm_and_objective(
    cuda: ModuleType, path: int, norm: str, objective: str, softcap: float | None, whole: bool
) -> None:
    about = {"norm": norm, "objective": objective, "softcap": softcap}
    if whole:
        about |= {"bias": normal(150, seed=3), "norm_weight": normal(48, seed=4), "norm_bias": normal(48, seed=6)}
    assert_head(cuda, *head_case(6, 48, 150, **about), path=path)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_relevance_head_of_strided_operands(cuda: ModuleType, name: str) -> None:
    from protoken.ops import Head

    hidden, targets, head = head_case(20, 61, 130, name, nested=True, bias=normal(260, seed=3)[::2])
    assert head.weight.stride(1) == 2
    hidden = hidden.T.contiguous().T
    targets = torch.stack([targets, targets], 1)[:, 0]
    assert_head(cuda, hidden, targets, head)
    tied = normal(150, 64, seed=8, dtype=DTYPES[name])[::2, 8:40]  # rows apart, aligned for fp32 alone or not at all
    assert_head(cuda, normal(3, 32, seed=9, dtype=DTYPES[name]), torch.tensor([0, 74, 5]), Head(tied))


@pytest.mark.parametrize("path", [1, 2], ids=["once", "twice"])
def test_relevance_head_of_one_row_and_of_a_width_that_takes_two_loads_per_thread(cuda: ModuleType, path: int) -> None:
    assert_head(cuda, *head_case(1, 16, 1, norm="none", objective="logit"), path=path)
    hidden, targets, head = head_case(2, 16, 1)
    grad, value = head_of(cuda, hidden, targets, head, path=path)
    assert float(grad.abs().max()) < 1e-6
    assert float(value.abs().max()) < 1e-6  # the only token there is has probability 1
    assert_head(cuda, *head_case(1, 4104, 40, "bf16"), path=path)


@pytest.mark.parametrize("path", [1, 2], ids=["once", "twice"])
def test_relevance_head_with_large_logits_and_masked_rows(cuda: ModuleType, path: int) -> None:
    bias = normal(400, seed=3)
    bias[:390] = -torch.inf  # whole parts of the vocabulary have no mass
    bias[395] = 500.0
    hidden, targets, head = head_case(3, 64, 400, norm="none", bias=bias)
    targets[:] = torch.tensor([395, 392, 399])
    assert_head(cuda, hidden * 50, targets, head, path=path)


def test_a_target_outside_the_vocabulary_spoils_its_own_token_alone(cuda: ModuleType) -> None:
    hidden, targets, head = head_case(3, 64, 100)
    right = head_of(cuda, hidden, targets, head)
    for wrong in (100, -1):
        targets[1] = wrong
        grad, value = head_of(cuda, hidden, targets, head)
        assert bool(grad[1].isnan().all() & value[1].isnan())
        for t in (0, 2):
            assert torch.equal(grad[t], right[0][t])
            assert torch.equal(value[t], right[1][t])


@pytest.mark.parametrize(("count", "path"), [(4, 1), (9, 1), (16, 2), (40, 2), (130, 2)])
def test_relevance_head_does_not_depend_on_other_tokens_or_on_the_run(cuda: ModuleType, count: int, path: int) -> None:
    hidden, targets, head = head_case(count, 64, 90)
    first = head_of(cuda, hidden, targets, head, path=path)
    again = head_of(cuda, hidden, targets, head, path=path)
    assert all(map(torch.equal, first, again))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    moved = head_of(cuda, hidden[order], targets[order], head, path=path)
    assert all(torch.equal(left[order], right) for left, right in zip(first, moved, strict=True))
    few = {4: 2, 9: 3, 16: 1, 40: 17, 130: 20}[count]
    part = head_of(cuda, hidden[:few], targets[:few], head, path=path)
    assert all(torch.equal(left[:few], right) for left, right in zip(first, part, strict=True))


def test_a_head_that_cannot_be_read_once_is_refused_by_name(cuda: ModuleType) -> None:
    from protoken.errors import ArgumentError

    hidden, targets, head = head_case(2, 33, 20)
    with pytest.raises(ArgumentError, match="cannot be read once"):
        head_of(cuda, hidden, targets, head, path=1)
    _, _, double = head_case(2, 16, 20)
    assert "float64" in cuda.why_not_relevance_head(hidden, targets, type(double)(double.weight.double()))
    assert "at least one" in cuda.why_not_relevance_head(hidden, targets, type(double)(double.weight[:0]))
    assert cuda.why_not_relevance_head(hidden, targets, head) is None


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_cuda_on_a_gpu_for_every_op(cuda: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_modules", {(op, "cuda"): cuda, (op, "triton"): "not asked"})
    assert dispatch.choose(op, "auto", torch.device("cuda")).name == "cuda"


def test_a_float64_head_goes_to_the_next_backend_and_by_name_says_why(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from protoken.errors import BackendError
    from protoken.ops import Head

    monkeypatch.setattr(dispatch, "_modules", {("relevance_head", "cuda"): cuda, ("relevance_head", "triton"): "gone"})
    operands = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), Head(torch.ones(5, 4, dtype=torch.float64))
    assert dispatch.choose("relevance_head", "auto", torch.device("cuda"), *operands).name == "torch"
    with pytest.raises(BackendError, match="float64"):
        dispatch.choose("relevance_head", "cuda", torch.device("cuda"), *operands)


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("of", FLOATS, ids=str)
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_capture_append(cuda: ModuleType, to: torch.dtype, of: torch.dtype, capacity: int) -> None:
    from protoken.ops import capture_append_reference

    got = [torch.zeros(capacity, n, dtype=to) for n in (5, 64, 0)]
    got += [torch.zeros(capacity, 90)[:, 3:36], torch.zeros(capacity, 4100, dtype=to)]
    expected = [buffer.clone() for buffer in got]
    cursor, place = torch.full((1,), 3), torch.full((1,), 3)
    for seed, tokens in enumerate((1, 3, 20)):
        widths = [buffer.shape[1] for buffer in got]
        steps = [normal(tokens, n, seed=seed + n, dtype=of) for n in widths]
        steps[3] = normal(33, tokens, seed=seed + 50, dtype=of).T
        cuda.launch_capture_append(got, steps, cursor)
        capture_append_reference(expected, steps, place)
        assert torch.equal(cursor, place)
        for left, right in zip(got, expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_capture_append_rounds_to_even_and_keeps_special_values(cuda: ModuleType, dtype: torch.dtype) -> None:
    special = [1.00390625, 1.01171875, float("nan"), float("inf"), -0.0, 3.4e38, 65504.0, 65519.9, 65520.0, 6e-8, 3e-8]
    step = torch.cat([torch.tensor(special), normal(500, seed=1) * 1e-5, normal(500, seed=2) * 3e4])[None]
    buffer = torch.zeros(2, step.shape[1], dtype=dtype)
    cuda.launch_capture_append([buffer], [step], torch.zeros(1, dtype=torch.int64))
    assert torch.equal(buffer[0].nan_to_num(7.0), step[0].to(dtype).nan_to_num(7.0))
    assert torch.equal(buffer[0].isnan(), step[0].to(dtype).isnan())


def test_capture_append_of_more_buffers_than_a_launch_takes(cuda: ModuleType) -> None:
    buffers, steps = [torch.zeros(4, 6) for _ in range(70)], [normal(3, 6, seed=n) for n in range(70)]
    cursor = torch.full((1,), 2)
    cuda.launch_capture_append(buffers, steps, cursor)
    assert int(cursor) == 5
    for buffer, step in zip(buffers, steps, strict=True):
        assert torch.equal(buffer[[2, 3, 0]], step)
