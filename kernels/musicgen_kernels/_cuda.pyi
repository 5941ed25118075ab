from collections.abc import Sequence

device_type: str

class LaunchError(RuntimeError): ...

def run(
    operation: str, addresses: Sequence[int], integers: Sequence[int], reals: Sequence[float], stream: int
) -> None: ...
