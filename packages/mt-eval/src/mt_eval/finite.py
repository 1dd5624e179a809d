"""What ends an evaluation or a text whose model computes NaN or infinity: no number made from it means anything."""

from mt_core.errors import MtError

EXIT_NON_FINITE = 1
ADVICE = "look for NaN and infinity in the weights (mt ckpt inspect), and try --dtype fp32"


class NonFiniteOutput(MtError):
    """A model's output is NaN or infinite at a place that the result depends on; `mt` exits with 1."""

    exit_code = EXIT_NON_FINITE

    def __init__(self, where: str, value: str, allowed: str = ADVICE) -> None:
        super().__init__(where, f"the model computes {value} here", allowed)
