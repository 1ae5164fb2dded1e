# The CUDA module; csrc/cuda_ops.h lists the columns of the tables. Addresses are integers.

def device(index: int) -> tuple[int, int, int, int]: ...
def versions() -> tuple[int, int]: ...
def client_scores_workspace(
    table: int,
    layers: int,
    clients: int,
    tokens: int,
    format: int,
    planes_x: int,
    vectors: bool,
    path: int,
    device: int,
) -> int: ...
def client_scores(
    table: int,
    layers: int,
    clients: int,
    tokens: int,
    format: int,
    planes_x: int,
    vectors: bool,
    path: int,
    workspace: int,
    bytes: int,
    device: int,
    stream: int,
) -> None: ...
def client_scores_lowrank_workspace(
    table: int, jobs: int, tokens: int, format: int, planes_x: int, path: int, device: int
) -> int: ...
def client_scores_lowrank(
    table: int,
    jobs: int,
    tokens: int,
    format: int,
    planes_x: int,
    path: int,
    workspace: int,
    bytes: int,
    device: int,
    stream: int,
) -> None: ...
def client_totals_workspace(table: int, layers: int, clients: int, format: int, vectors: bool) -> int: ...
def client_totals(
    table: int,
    layers: int,
    clients: int,
    format: int,
    vectors: bool,
    workspace: int,
    bytes: int,
    device: int,
    stream: int,
) -> None: ...
def relevance_head_workspace(
    table: int,
    format: int,
    vectors: bool,
    norm: int,
    logprob: bool,
    path: int,
    eps: float,
    scale: float,
    softcap: float,
    device: int,
) -> int: ...
def relevance_head(
    table: int,
    format: int,
    vectors: bool,
    norm: int,
    logprob: bool,
    path: int,
    eps: float,
    scale: float,
    softcap: float,
    workspace: int,
    bytes: int,
    device: int,
    stream: int,
) -> None: ...
def capture_append(
    table: int, buffers: int, capacity: int, tokens: int, cursor: int, device: int, stream: int
) -> None: ...
