"""CPU kernels: every pointer is an address given as an integer; row layouts stand in csrc/<op>.h."""

def client_scores(
    layers: int, layer_count: int, clients: int, tokens: int, out: int, threads: int
) -> None: ...
