"""What a kind of GPU does per second, measured; a TOML file each, ours in `profiles/` or the user's own."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from mt_core.config.loading import read_toml, validate
from mt_core.config.sections import Section
from mt_core.errors import MtError
from mt_core.plugins import did_you_mean


class Rates(Section):
    """Arithmetic of one dtype, in 10¹² FLOP/s; causal attention counts at half, and backward as twice forward."""

    gemm: PositiveFloat
    """Matrix products of a training step, sustained."""
    attention_forward: PositiveFloat
    """The forward pass of the fused attention core."""
    attention_backward: PositiveFloat
    """The backward pass of the fused attention core."""


class Profile(Section):
    """A kind of GPU and how several are connected."""

    name: str
    """What it is called in output."""
    memory_gib: PositiveFloat
    """Memory that a process can use."""
    reserved_gib: NonNegativeFloat
    """Taken by the CUDA context, NCCL and libraries."""
    peak_tflops: PositiveFloat
    """Dense bf16 peak of the data sheet, for shares of peak."""
    copy_tb_s: PositiveFloat
    """Bytes read and written by memory-bound kernels, in 10¹² bytes/s."""
    gpus_per_node: PositiveInt
    """GPUs that the fast links join."""
    link_gb_s: PositiveFloat
    """Bus bandwidth of collectives within a node, in 10⁹ bytes/s for each GPU."""
    network_gb_s: PositiveFloat
    """Bus bandwidth of collectives between nodes, in 10⁹ bytes/s for each GPU."""
    latency_us: NonNegativeFloat
    """Time of a small collective."""
    rates: dict[str, Rates]
    """By dtype."""
    assumed: tuple[str, ...] = ()
    """Fields that nobody has measured yet."""

    def get_rates(self, dtype: str) -> Rates:
        """The rates of a `precision.dtype`; `MtError` if the profile has none."""
        if dtype not in self.rates:
            known = ", ".join(self.rates)
            raise MtError("precision.dtype", f"profile {self.name!r} has no rates for {dtype}", f"allowed: {known}")
        return self.rates[dtype]


def profile_names() -> list[str]:
    """Profiles that come with mt."""
    paths = files("mt_core.planning.profiles").iterdir()
    return sorted(path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml"))


def read_profile(name: str) -> Profile:
    """One of ours by name, or a TOML file; `MtError` names every wrong field."""
    if not name.endswith(".toml"):
        if name not in profile_names():
            allowed = did_you_mean(name, profile_names())
            raise MtError("--profile", f"unknown profile {name!r}", f"{allowed}, or a FILE.toml")
        layer = read_toml(Path(str(files("mt_core.planning.profiles") / f"{name}.toml")), f"profile {name}")
    else:
        layer = read_toml(Path(name))
    profile: Any = validate(Profile, layer.values, [layer])
    return profile
