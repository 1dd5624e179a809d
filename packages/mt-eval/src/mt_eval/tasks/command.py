"""`mt eval`, a group of the installed evaluation tasks, and the tasks of mt-eval; only `mt` imports this module.

Each leaves the arithmetic to the file of its own name. Heavy imports wait until a task runs, so --help is instant.
"""

from typing import Annotated

from typer import Option

from mt_core.cli.options import expand_options
from mt_core.cli.plugin_group import plugin_group
from mt_eval.options import ModelOptions, TaskOptions, TokenizerOptions

app = plugin_group("eval-task", "Evaluate a checkpoint on a task.")
"""`mt eval`: each task is imported when it is run."""


@expand_options
def lambada(
    task: TaskOptions,
    model: ModelOptions,
    tokenizer: TokenizerOptions,
    strict: Annotated[
        bool | None,
        Option("--strict/--loose", help="Whole last words or last tokens only; both if not given.", show_default=False),
    ] = None,
) -> None:
    """LAMBADA: how often the last word of a passage is the model's first choice.

    --data is a JSONL file with a passage under "text" on each line. Published figures are strict.

    Example:
      mt eval lambada --load-dir hf --data lambada_test.jsonl --strict
    """
    from mt_eval.tasks.evaluation import Evaluation
    from mt_eval.tasks.lambada import (
        MODES,
        answer,
        compute_metrics,
        get_max_tokens,
        list_samples,
        make_clozes,
        read_passages,
    )

    run = Evaluation.start("lambada", task, model=model, tokenizer=tokenizer)
    passages = read_passages(task.data)
    modes = list(MODES) if strict is None else ["strict" if strict else "loose"]
    examples = {mode: make_clozes(passages, mode, run.encoder) for mode in modes}
    seq_length, source = run.seq_length(get_max_tokens(examples))
    network = run.load_model()
    batch_size = run.batch_size(network, seq_length)
    answers = answer(network, examples, seq_length=seq_length, batch_size=batch_size)
    correct = {f"{mode}_correct": sum(each.correct for each in row) for mode, row in answers.items()}
    run.finish(
        compute_metrics(answers),
        counts={"passages": len(passages)} | correct,
        settings={"seq_length": seq_length, "seq_length_from": source, "batch_size": batch_size},
        samples=list_samples(passages, answers, run.encoder.tokenizer),
    )


@expand_options
def wikitext103(
    task: TaskOptions,
    model: ModelOptions,
    tokenizer: TokenizerOptions,
    overlapping_eval: Annotated[
        int, Option(min=1, help="Targets scored by each window after the first; fewer is slower. Published: 32.")
    ] = 32,
    detokenizer: Annotated[
        str,
        Option(
            help="How words become running text: wikitext, ptb (Penn Treebank) or none.",
            autocompletion=lambda: ["wikitext", "ptb", "none"],
        ),
    ] = "wikitext",
) -> None:
    """WikiText-103: perplexity per word of the original file, as published for Megatron.

    --data is the word-tokenised test file. Windows have --seq-length tokens: 1024, or what the run trained at if fewer.
    Each starts --overlapping-eval tokens after the one before; with the sequence length they do not overlap, which is
    32 times as fast and gives a somewhat higher perplexity. Another word-tokenised file needs its own --detokenizer;
    the path says nothing.

    Example:
      mt eval wikitext103 --load-dir hf --data wiki.test.tokens
    """
    from mt_data.text_io.texts import read_text
    from mt_eval.tasks.evaluation import Evaluation
    from mt_eval.tasks.wikitext103 import compute_metrics, list_samples, prepare

    run = Evaluation.start("wikitext103", task, model=model, tokenizer=tokenizer)
    text, words = prepare(read_text(task.data), run.encoder, str(task.data), detokenizer)
    losses, settings = run.score(text, overlapping_eval)
    run.finish(
        compute_metrics(losses, text, words),
        counts={"articles": len(text.documents), "tokens": len(text.tokens), "original_words": sum(words)},
        settings=settings | {"detokenizer": detokenizer},
        samples=list_samples(losses, text, words),
    )


@expand_options
def perplexity(
    task: TaskOptions,
    model: ModelOptions,
    tokenizer: TokenizerOptions,
    overlapping_eval: Annotated[
        int | None,
        Option(min=1, help="Targets scored by each window after the first; all if not given.", show_default=False),
    ] = None,
) -> None:
    """Perplexity per token, and bits per byte, of held-out text.

    --data is a text file, or .jsonl, .ndjson, .json or .parquet with a document under "text" on each line or row.
    Windows have --seq-length tokens: 1024, or what the run trained at if fewer.

    Example:
      mt eval perplexity --load-dir run --data heldout.jsonl
    """
    from mt_eval.tasks.evaluation import Evaluation
    from mt_eval.tasks.perplexity import compute_metrics, list_samples, prepare, read_documents

    run = Evaluation.start("perplexity", task, model=model, tokenizer=tokenizer)
    documents = read_documents(task.data)
    text, sizes = prepare(documents, run.encoder)
    losses, settings = run.score(text, overlapping_eval)
    run.finish(
        compute_metrics(losses, text, sizes),
        counts={"documents": len(documents), "tokens": len(text.tokens), "bytes": sum(sizes)},
        settings=settings,
        samples=list_samples(losses, text, sizes),
    )


@expand_options
def qa(
    task: TaskOptions,
    model: ModelOptions,
    tokenizer: TokenizerOptions,
    contexts: Annotated[int, Option(min=0, help="Passages that stand before the question, if the data has some.")] = 5,
    template: Annotated[
        str | None, Option(help="The prompt, {question} in it; 'Question: …', 'Answer:' on two lines if not given.")
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Most new tokens of an answer.")] = 64,
    stop: Annotated[list[str] | None, "End an answer before this text; may be given several times."] = None,
    limit: Annotated[int | None, Option(min=1, help="The first questions only, so many.")] = None,
) -> None:
    """Question answering without examples: F1 and exact match of greedy answers.

    --data has a JSON object on each line, or a list of them: "question", "answers", a list of texts, and "ctxs", a
    list of objects with "title" and "text", if passages are to help. F1, precision and recall compare with the first
    answer, exact match with all.

    Example:
      mt eval qa --load-dir hf --data nq_test.json --output results.json
    """
    from mt_eval.load import choose_ends
    from mt_eval.tasks import qa as questions
    from mt_eval.tasks.evaluation import Evaluation

    questions.check_template(template or questions.TEMPLATE)
    run = Evaluation.start("qa", task, model=model, tokenizer=tokenizer)
    asked = questions.read_questions(task.data, limit)
    prompts = [question.make_prompt(template or questions.TEMPLATE, contexts) for question in asked]
    seq_length, source = run.seq_length()
    ends = choose_ends(run.checkpoint, run.encoder.tokenizer)
    how = questions.Answering(max_new_tokens, seq_length, ends, tuple(stop or ()), task.batch_size)
    predictions, cut = questions.answer(run.load_model(), run.encoder, prompts, how)
    scores = questions.score(asked, predictions)
    run.finish(
        questions.compute_metrics(scores),
        counts={"questions": len(asked), "cut_prompts": cut},
        settings={
            "seq_length": seq_length,
            "seq_length_from": source,
            "batch_size": task.batch_size or "auto",
            "max_new_tokens": max_new_tokens,
            "contexts": contexts,
            "template": template or questions.TEMPLATE,
        },
        samples=questions.list_samples(asked, predictions, scores),
    )
