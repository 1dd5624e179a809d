"""What a fine-tuned model says of examples: a probability for each class, or a number, and files of such predictions.

A file is JSON lines, in the order of the examples: `uid`, `label` (null if the example has none), `prediction`, and
`scores`, the probability of each class by its name, or the number as `score`. It appears whole or not at all.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mt_core.errors import MtError
from mt_core.files import atomic_file, open_to_read
from mt_core.progress import progress
from mt_eval.finetuning.examples import UNLABELLED, EncodedExamples, Example
from mt_eval.finetuning.metrics import Quality, measure
from mt_eval.finetuning.sections import TaskSection, get_classes, load_sets, make_lengths
from mt_eval.finite import NonFiniteOutput
from mt_eval.report import write_document

if TYPE_CHECKING:
    import torch

    from mt_data.tokenizers.base import MaskingTokenizer

FOLDER = "predictions"
"""Where a run keeps them: a file for each validation and test set."""
SUMMARY = "summary.json"
"""How many are right, beside them."""
NUMBER = "score"
"""What a prediction that is a number is called among the scores, where it is alone."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one example."""

    uid: str
    label: str | float | None
    """A class, or a number of tasks whose labels are numbers."""
    scores: Mapping[str, float]
    threshold: float | None = None
    """The probability above which the second of two classes is predicted; None for the likelier one."""

    @property
    def is_number(self) -> bool:
        """Whether it is a number, and no class."""
        return tuple(self.scores) == (NUMBER,)

    @property
    def prediction(self) -> str | float:
        """The class with the highest probability, of equal ones the first, or as the threshold says; or the number."""
        if self.is_number:
            return self.scores[NUMBER]
        if self.threshold is not None:
            first, second = self.scores
            return second if self.scores[second] > self.threshold else first
        return max(self.scores, key=lambda name: self.scores[name])

    def dump(self) -> dict[str, Any]:
        """Plain values of a line."""
        return {"uid": self.uid, "label": self.label, "prediction": self.prediction, "scores": dict(self.scores)}


def predict(
    model: "torch.nn.Module",
    samples: EncodedExamples,
    classes: Sequence[str],
    *,
    batch_size: int,
    device: "torch.device",
    labels: Sequence[str] = (),
) -> list[Prediction]:
    """The model's prediction of each example, a number if there are no classes; a logit that is not finite is an
    `MtError` that names the example.

    `classes` are in the order of the logits; `labels`, if given, are the same in the order of the samples' labels.
    """
    import torch

    predictions, labels = list[Prediction](), labels or classes
    with torch.inference_mode(), progress("predicting", len(samples), "examples") as advance:
        for first in range(0, len(samples), batch_size):
            numbers = range(first, min(first + batch_size, len(samples)))
            arrays = [samples[number] for number in numbers]
            batch = {
                name: torch.stack([torch.from_numpy(array[name]) for array in arrays]).to(device)
                for name in ("text", "types", "padding_mask")
            }
            outputs_BC = model(batch["text"], batch["types"], batch["padding_mask"]).double()
            rows = outputs_BC.softmax(-1) if classes else outputs_BC
            for number, row in zip(numbers, rows.tolist(), strict=True):
                example = samples.examples[number]
                if not all(map(isfinite, row)):
                    raise NonFiniteOutput(f"example {example.uid}", "a logit that is not finite")
                label = None if example.label == UNLABELLED else _spell_label(example.label, labels)
                scores = dict(zip(classes or (NUMBER,), row, strict=True))
                predictions.append(Prediction(example.uid, label, {name: scores[name] for name in labels or scores}))
            advance(len(numbers))
    return predictions


def _spell_label(label: float, classes: Sequence[str]) -> str | float:
    return classes[int(label)] if classes else label


def predict_run(
    run_dir: Path, data: TaskSection, tests: Mapping[str, Sequence[Example]]
) -> dict[str, list[Prediction]]:
    """Predict every validation and test set with a run's last step, and write a file for each to RUN/predictions.

    Nothing is written if there are no sets.
    """
    from mt_core.checkpoint.native import read_meta, steps
    from mt_core.distributed.process_group import pick_device
    from mt_eval.load import Checkpoint, load_network, load_tokenizer

    sets = {**load_sets(data).valid, **tests}
    if not sets:
        return {}
    step = steps(run_dir)[-1]
    config = read_meta(step)["config"]
    checkpoint = Checkpoint.open(step, "native")
    device = pick_device(config["runtime"]["device"])
    model = load_network(checkpoint, device=device.type)
    tokenizer = cast("MaskingTokenizer", load_tokenizer(checkpoint))
    predictions = dict[str, list[Prediction]]()
    for name, examples in sets.items():
        samples = EncodedExamples(examples, tokenizer, make_lengths(data))
        predictions[name] = predict(
            model, samples, get_classes(data), batch_size=config["batch"]["micro_batch"], device=device
        )
        write_predictions(run_dir / FOLDER / f"{name}.jsonl", predictions[name])
    write_summary(run_dir / FOLDER, predictions)
    return predictions


def measure_sets(sets: Mapping[str, Sequence[Prediction]]) -> dict[str, Quality]:
    """How right the predictions of each set are, and those of `all` together if there are several."""
    qualities = {name: measure(predictions) for name, predictions in sets.items()}
    if len(qualities) > 1:
        qualities["all"] = measure([each for predictions in sets.values() for each in predictions])
    return qualities


def write_summary(folder: Path, sets: Mapping[str, Sequence[Prediction]]) -> None:
    """Write the metrics of each set to `summary.json` in a folder of predictions."""
    write_document(folder / SUMMARY, {name: each.dump() for name, each in measure_sets(sets).items()})


def print_qualities(sets: Mapping[str, Sequence[Prediction]]) -> None:
    """Print how right the predictions of each set, and of all together, are."""
    qualities = measure_sets(sets)
    width = max(map(len, qualities), default=0)
    for name, quality in qualities.items():
        print(f"{name:<{width}}  {quality}")


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write a file, in place of an earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(each.dump(), ensure_ascii=False) + "\n" for each in predictions)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file; `MtError` names the first line that is none."""
    with open_to_read(path) as file:
        predictions = [*_read_lines(path, file)]
    if not predictions:
        raise MtError(str(path), "is empty", "a file that mt task wrote")
    return predictions


def _read_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Prediction]:
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            scores = {str(name): float(score) for name, score in values["scores"].items()}
            label = values["label"]
            prediction = Prediction(str(values["uid"]), label, scores)
            is_number = isinstance(label, float | int) and not isinstance(label, bool) and isfinite(label)
            fits = label is None or (is_number if prediction.is_number else label in scores)
            if not scores or not all(map(isfinite, scores.values())) or not fits:
                raise ValueError("scores of no class, or a label that is none of them")
            yield prediction
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            allowed = "an object with uid, label and scores, as mt task writes them"
            raise MtError(f"{path}:{number}", f"is no prediction ({err})", allowed) from err
