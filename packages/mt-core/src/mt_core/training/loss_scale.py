"""The loss scale of fp16: it keeps small gradients from vanishing, and follows the large ones (arXiv:1710.03740)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mt_core.config.sections import PrecisionConfig


@dataclass(slots=True)
class LossScale:
    """The factor on the loss, and its history."""

    value: float = 1.0
    good_steps: int = 0
    """Finite steps since the last change."""
    overflows_left: int = 0
    """Overflows until it is halved; refilled only when the scale grows."""

    @classmethod
    def initial(cls, config: PrecisionConfig) -> Self:
        """The scale at the beginning of a run; 1 for every precision but fp16."""
        if config.dtype != "fp16":
            return cls()
        return cls(config.loss_scale or config.initial_loss_scale, overflows_left=config.hysteresis)

    def resume(
        self,
        config: PrecisionConfig,
        saved: Mapping[str, float | int],
        saved_precision: Mapping[str, float | int | str | None],
    ) -> None:
        """Go on with a saved scale if it followed the gradients and still does; otherwise the configured one stays.

        A narrower configuration holds from now on: the scale is at least `min_loss_scale`, and no more overflows are
        left than `hysteresis`.
        """
        followed = saved_precision.get("dtype") == "fp16" and not saved_precision.get("loss_scale")
        if config.dtype != "fp16" or config.loss_scale or not followed:
            return
        self.value = max(float(saved["value"]), config.min_loss_scale)
        self.good_steps = int(saved["good_steps"])
        self.overflows_left = min(int(saved["overflows_left"]), config.hysteresis)

    def searches(self, config: PrecisionConfig) -> bool:
        """Whether an overflow is how the scale finds its value, and no sign of anything wrong."""
        return config.dtype == "fp16" and not config.loss_scale and self.value > config.min_loss_scale

    def after_step(self, config: PrecisionConfig, *, finite: bool) -> None:
        """Grow after many finite steps, shrink after overflows; only a dynamic scale of fp16 moves."""
        if config.dtype != "fp16" or config.loss_scale:
            return
        if finite:
            self.good_steps += 1
            if self.good_steps >= config.loss_scale_window:  # more, where a resumed run has a shorter window
                self.value, self.good_steps, self.overflows_left = self.value * 2, 0, config.hysteresis
            return
        self.good_steps, self.overflows_left = 0, self.overflows_left - 1
        if self.overflows_left <= 0:
            self.value = max(self.value / 2, config.min_loss_scale)
