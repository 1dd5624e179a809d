"""Run tasks of lm-evaluation-harness on a checkpoint and report: everything cheap is checked before the model loads."""

import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from mt_core.distributed.process_group import pick_device
from mt_core.errors import MtError
from mt_eval.encoding import TextEncoder
from mt_eval.generation.ranks.processes import open_model
from mt_eval.harness.command import ChatOptions, HarnessOptions
from mt_eval.harness.results import KEPT, flatten, make_table, to_plain, write_all_samples
from mt_eval.harness.tasks import SEED, load_tasks, set_num_fewshot
from mt_eval.load import Checkpoint, choose_ends, find_template, load_tokenizer
from mt_eval.options import ModelOptions, RankOptions, TokenizerOptions
from mt_eval.report import Report, check_output, write_document
from mt_eval.tasks.evaluation import choose_seq_length

if TYPE_CHECKING:
    from mt_data.datasets.sft.template import ChatTemplate


def run_tasks(
    task: HarnessOptions, chat: ChatOptions, *, model: ModelOptions, ranks: RankOptions, tokenizer: TokenizerOptions
) -> None:
    """Run the tasks, print a table, and write the results and the samples if there is an output."""
    started = time.monotonic()
    from lm_eval.evaluator import evaluate

    from mt_eval.harness.model import HarnessModel, choose_begin

    _seed_everything()
    names, limit = task.names(), task.samples()
    chat.check()
    check_output(task.output)
    checkpoint = Checkpoint.open(task.load_dir, model.loader, model.loader_options)
    encoder = TextEncoder.create(load_tokenizer(checkpoint, tokenizer.config()), bos=task.bos)
    template = _choose_template(checkpoint, chat)
    seq_length, source = choose_seq_length(checkpoint, task.seq_length)
    tasks = load_tasks(names, task.include_path or [], seq_length=seq_length)
    set_num_fewshot(tasks["tasks"].values(), task.num_fewshot)
    print(f"harness: inputs of at most {seq_length:,} tokens ({source})", file=sys.stderr)
    with open_model(checkpoint, model, ranks) as network:
        harness_model = HarnessModel(
            network,
            encoder,
            seq_length=seq_length,
            begin=choose_begin(encoder, bos=task.bos),
            ends=choose_ends(checkpoint, encoder.tokenizer),
            batch_size=task.batch_size,
            find_template=lambda: template,
        )
        answers = evaluate(
            harness_model,
            tasks,
            limit=cast("int | None", limit),
            apply_chat_template=chat.apply_chat_template,
            system_instruction=chat.system_instruction,
            fewshot_as_multiturn=chat.multiturn,
        )
    results = cast("Mapping[str, Any] | None", answers)
    assert results is not None, "one process"
    report = Report(
        task="harness",
        model=str(task.load_dir),
        data=",".join(names),
        metrics=flatten(results),
        counts={name: count["effective"] for name, count in results["n-samples"].items()},
        settings={
            "seq_length": seq_length,
            "seq_length_from": source,
            "batch_size": task.batch_size or "auto",
            "limit": "all" if limit is None else limit,
            "chat_template": template.where if template else "none",
            "system_instruction": chat.system_instruction or "none",
            "fewshot_as_multiturn": chat.multiturn,
            "num_fewshot": "the task's" if task.num_fewshot is None else task.num_fewshot,
            "device": pick_device(model.device, where="--device").type,
            "dtype": model.dtype,
            "ranks": f"tensor {ranks.tensor} × pipeline {ranks.pipeline}" if ranks.nproc > 1 else "1",
            "tokenizer": type(encoder.tokenizer).__name__,
            "before_each_text": encoder.describe_prefix(),
        },
        seconds=time.monotonic() - started,
    )
    _publish(report, results, task)


def _seed_everything() -> None:
    """Seed as lm-evaluation-harness does before it loads tasks, so that those which draw have the same samples."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _choose_template(checkpoint: Checkpoint, chat: ChatOptions) -> "ChatTemplate | None":
    """The template of conversations, if samples are asked so."""
    if not chat.apply_chat_template:
        return None
    template = find_template(checkpoint, chat.chat_template)
    if template is None:
        actual = "the tokenizer of this model has no chat template"
        raise MtError("--apply-chat-template", actual, "name a Jinja file: --chat-template FILE")
    return template


def _publish(report: Report, results: Mapping[str, Any], task: HarnessOptions) -> None:
    """Print first, as writing many samples may fill the disk; then write the results, and the samples last."""
    rows = [("model", report.model), *((name, str(value)) for name, value in report.settings.items())]
    rows.append(("seconds", f"{report.seconds:.1f}"))
    width = max(len(name) for name, _ in rows)
    print("harness", *(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in rows), sep="\n")
    print("", *make_table(results), sep="\n", flush=True)
    if task.output is not None:
        document = report.document()
        document["versions"]["lm-eval"] = version("lm-eval")
        document["lm_eval"] = to_plain({name: results[name] for name in KEPT if name in results})
        write_document(task.output, document)
        write_all_samples(task.output, results.get("samples", {}))
