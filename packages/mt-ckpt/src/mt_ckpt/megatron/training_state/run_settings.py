"""Between mt's settings of a run and Megatron's arguments, scheduler and parameter groups.

Megatron's scheduler counts samples, mt steps or samples: both are the same where the batch does not grow.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Values = Mapping[str, Any]
DECAYS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "inverse_sqrt": "inverse-square-root",
    "wsd": "WSD",
}
PRECISIONS = {"bf16": "bf16", "fp16": "fp16"}
PLAIN = {
    "optim.lr": "lr",
    "lr_schedule.min_lr": "min_lr",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_eps",
    "optim.weight_decay": "weight_decay",
    "optim.clip_norm": "clip_grad",
    "batch.global_batch": "global_batch_size",
    "batch.micro_batch": "micro_batch_size",
    "train.steps": "train_iters",
    "lr_schedule.warmup_steps": "lr_warmup_iters",
    "lr_schedule.decay_steps": "lr_decay_iters",
    "lr_schedule.anneal_steps": "lr_wsd_decay_iters",
    "lr_schedule.warmup_samples": "lr_warmup_samples",
    "lr_schedule.decay_samples": "lr_decay_samples",
    "lr_schedule.anneal_samples": "lr_wsd_decay_samples",
    "lr_schedule.anneal": "lr_wsd_decay_style",
    "data.seq_length": "seq_length",
    "data.decoder_seq_length": "decoder_seq_length",
    "runtime.seed": "seed",
}
"""Settings that mean the same, ours to theirs."""
TO_MT = {
    ours: theirs for ours, theirs in PLAIN.items() if not ours.startswith("data.") and not ours.endswith("_samples")
}
"""Settings that a file for mt gets from Megatron's arguments: neither data, which its reader describes, nor counts of
samples, which come from the scheduler."""


def to_args(config: Values) -> dict[str, Any]:
    """Megatron's arguments for mt's settings, as a checkpoint holds them."""
    args = {theirs: value for ours, theirs in PLAIN.items() if (value := _at(config, ours)) is not None}
    if "decoder_seq_length" in args:
        args["encoder_seq_length"] = args["seq_length"]  # what T5 calls it
    dtype = config["precision"]["dtype"]
    return args | {
        "optimizer": "adam",
        "lr_decay_style": DECAYS[config["lr_schedule"]["decay"]],
        "start_weight_decay": config["optim"]["weight_decay"],
        "end_weight_decay": config["optim"]["weight_decay"],
        "weight_decay_incr_style": "constant",
        **{theirs: dtype == ours for ours, theirs in PRECISIONS.items()},
    }


def build_scheduler(args: Values, samples: int) -> dict[str, Any]:
    """The scheduler's state after so many samples."""
    batch = args["global_batch_size"]
    return {
        "max_lr": args["lr"],
        "lr_warmup_steps": args.get("lr_warmup_samples") or args["lr_warmup_iters"] * batch,
        "num_steps": samples,
        "lr_decay_style": args["lr_decay_style"],
        "lr_decay_steps": args.get("lr_decay_samples") or (args.get("lr_decay_iters") or args["train_iters"]) * batch,
        "min_lr": args["min_lr"],
        "start_wd": args["weight_decay"],
        "end_wd": args["weight_decay"],
        "wd_incr_style": "constant",
        "wd_incr_steps": args["train_iters"] * batch,
    }


def default_param_groups(args: Values, rate: float) -> list[dict[str, Any]]:
    """Megatron's two parameter groups: matrices decay, biases and vectors do not."""
    return [
        {
            "wd_mult": multiplier,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "max_lr": args["lr"],
            "min_lr": args["min_lr"],
            "lr": rate,
            "betas": (args["adam_beta1"], args["adam_beta2"]),
            "eps": args["adam_eps"],
            "weight_decay": args["weight_decay"] * multiplier,
            "bias_correction": True,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
        }
        for multiplier in (1.0, 0.0)
    ]


def to_sections(args: Values, scheduler: Values) -> dict[str, dict[str, Any]]:
    """mt's settings for Megatron's arguments; those that a checkpoint does not say are left out."""
    sections: dict[str, dict[str, Any]] = {
        "optim": {},
        "train": {},
        "lr_schedule": {},
        "batch": {},
        "precision": {},
        "runtime": {},
    }
    for ours, theirs in TO_MT.items():
        if args.get(theirs) is not None:
            section, name = ours.split(".")
            sections[section][name] = args[theirs]
    styles = {theirs: ours for ours, theirs in DECAYS.items()}
    batch = args.get("global_batch_size")
    if scheduler.get("lr_decay_style") in styles:
        sections["lr_schedule"]["decay"] = styles[scheduler["lr_decay_style"]]
    if sections["lr_schedule"].get("decay") != "wsd":
        for name in ("anneal", "anneal_steps"):
            sections["lr_schedule"].pop(name, None)
    if batch and scheduler:
        sections["lr_schedule"] = _count_schedule(sections["lr_schedule"], args, scheduler, batch)
        sections["lr_schedule"]["min_lr"] = scheduler["min_lr"]
        sections["optim"]["lr"] = scheduler["max_lr"]
    dtype = next((ours for ours, theirs in PRECISIONS.items() if args.get(theirs)), "fp32")
    sections["precision"]["dtype"] = dtype
    return {name: values for name, values in sections.items() if values}


def _count_schedule(schedule: Values, args: Values, scheduler: Values, batch: int) -> dict[str, Any]:
    """The schedule with the scheduler's lengths, in steps if those are whole and the batch does not grow."""
    lengths = {"warmup": scheduler["lr_warmup_steps"], "decay": scheduler["lr_decay_steps"]}
    if schedule.get("decay") == "wsd":
        lengths["anneal"] = args.get("lr_wsd_decay_samples") or (args.get("lr_wsd_decay_iters") or 0) * batch
    whole = not args.get("rampup_batch_size") and not any(length % batch for length in lengths.values())
    unit, size = ("steps", batch) if whole else ("samples", 1)
    counts = {f"{name}_{unit}": length // size for name, length in lengths.items() if length or name == "warmup"}
    if counts.get("warmup_samples") == 0:
        del counts["warmup_samples"]
    rest = {name: value for name, value in schedule.items() if not name.endswith("_steps")}
    return rest | counts


def not_carried_to_mt(args: Values, scheduler: Values) -> Iterator[str]:
    """What Megatron's settings ask for and mt's have no word for."""
    if args.get("optimizer") not in (None, "adam"):
        yield f"the optimizer {args['optimizer']}: mt goes on with AdamW"
    if args.get("rampup_batch_size"):
        yield "the growing batch: set batch.rampup"
    style = scheduler.get("lr_decay_style")
    if scheduler and style not in DECAYS.values():
        yield f"the decay {style} of the learning rate: set lr_schedule.decay"
    if scheduler.get("start_wd") != scheduler.get("end_wd"):
        yield "the growing weight decay: set optim.weight_decay"


def not_carried_to_megatron(config: Values) -> Iterator[str]:
    """What mt's settings ask for and Megatron's arguments have no word for."""
    if config["optim"]["name"] != "adamw":
        yield f"the optimizer {config['optim']['name']}: Megatron goes on with Adam"
    if config["batch"].get("rampup") or config["batch"].get("sizes"):
        counted = config["lr_schedule"].get("decay_samples") is not None
        steps = "" if counted else "; the learning rate then counts samples of the full batch, not steps"
        yield f"the growing batch: set --rampup-batch-size{steps}"


def _at(config: Values, path: str) -> Any:
    section, name = path.split(".")
    return config.get(section, {}).get(name)
