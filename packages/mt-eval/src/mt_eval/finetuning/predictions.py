"""What a fine-tuned model says of examples: a probability for each class, and files of such predictions.

A file is JSON lines, in the order of the examples: `uid`, `label` (null if the example has none), `prediction`, and
`scores`, the probability of each class by its name. It appears whole or not at all.
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
from mt_eval.finetuning.sections import TaskSection, get_classes, load_sets, make_lengths
from mt_eval.finite import NonFiniteOutput
from mt_eval.report import write_document
from mt_eval.standard_errors import compute_share, pair_errors

if TYPE_CHECKING:
    import torch

    from mt_data.tokenizers.base import MaskingTokenizer

FOLDER = "predictions"
"""Where a run keeps them: a file for each validation and test set."""
SUMMARY = "summary.json"
"""How many are right, beside them."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one example."""

    uid: str
    label: str | None
    scores: Mapping[str, float]

    @property
    def prediction(self) -> str:
        """The class with the highest probability; of equal ones the first."""
        return max(self.scores, key=lambda name: self.scores[name])

    def dump(self) -> dict[str, Any]:
        """Plain values of a line."""
        return {"uid": self.uid, "label": self.label, "prediction": self.prediction, "scores": dict(self.scores)}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of the examples with a label have been predicted right."""

    correct: int
    labelled: int

    @classmethod
    def count(cls, predictions: Sequence[Prediction]) -> "Accuracy":
        """Count predictions that are the label."""
        labelled = [each for each in predictions if each.label is not None]
        return cls(sum(each.prediction == each.label for each in labelled), len(labelled))

    def __add__(self, other: "Accuracy") -> "Accuracy":
        return Accuracy(self.correct + other.correct, self.labelled + other.labelled)

    def __str__(self) -> str:
        if not self.labelled:
            return "no labels"
        share, error = compute_share(self.correct, self.labelled)
        text = f"{self.correct:,} of {self.labelled:,} right, accuracy {share:.4f}"
        return text if error is None else f"{text} ± {error:.4f}"

    def dump(self) -> dict[str, float]:
        """Plain values: what is right, of how many, and their share with its standard error over examples."""
        counts = {"correct": self.correct, "labelled": self.labelled}
        accuracy = {"accuracy": compute_share(self.correct, self.labelled)} if self.labelled else {}
        return counts | pair_errors(accuracy)


def predict(
    model: "torch.nn.Module",
    samples: EncodedExamples,
    classes: Sequence[str],
    *,
    batch_size: int,
    device: "torch.device",
) -> list[Prediction]:
    """The model's prediction of each example; a logit that is not finite is an `MtError` that names the example."""
    import torch

    predictions = list[Prediction]()
    with torch.inference_mode(), progress("predicting", len(samples), "examples") as advance:
        for first in range(0, len(samples), batch_size):
            numbers = range(first, min(first + batch_size, len(samples)))
            arrays = [samples[number] for number in numbers]
            batch = {
                name: torch.stack([torch.from_numpy(array[name]) for array in arrays]).to(device)
                for name in ("text", "types", "padding_mask")
            }
            logits_BC = model(batch["text"], batch["types"], batch["padding_mask"])
            for number, row in zip(numbers, logits_BC.double().softmax(-1).tolist(), strict=True):
                example = samples.examples[number]
                if not all(map(isfinite, row)):
                    raise NonFiniteOutput(f"example {example.uid}", "a logit that is not finite")
                label = None if example.label == UNLABELLED else classes[example.label]
                predictions.append(Prediction(example.uid, label, dict(zip(classes, row, strict=True))))
            advance(len(numbers))
    return predictions


def predict_run(
    run_dir: Path, data: TaskSection, tests: Mapping[str, Sequence[Example]]
) -> dict[str, list[Prediction]]:
    """Predict every validation and test set with a run's last step, and write a file for each to RUN/predictions."""
    from mt_core.checkpoint.native import read_meta, steps
    from mt_core.distributed.process_group import pick_device
    from mt_eval.load import Checkpoint, load_network, load_tokenizer

    step = steps(run_dir)[-1]
    config = read_meta(step)["config"]
    checkpoint = Checkpoint.open(step, "native")
    device = pick_device(config["runtime"]["device"])
    model = load_network(checkpoint, device=device.type)
    tokenizer = cast("MaskingTokenizer", load_tokenizer(checkpoint))
    predictions = dict[str, list[Prediction]]()
    for name, examples in {**load_sets(data).valid, **tests}.items():
        samples = EncodedExamples(examples, tokenizer, make_lengths(data))
        predictions[name] = predict(
            model, samples, get_classes(data), batch_size=config["batch"]["micro_batch"], device=device
        )
        write_predictions(run_dir / FOLDER / f"{name}.jsonl", predictions[name])
    write_summary(run_dir / FOLDER, predictions)
    return predictions


def count_accuracies(sets: Mapping[str, Sequence[Prediction]]) -> dict[str, Accuracy]:
    """How many predictions of each set, and of `all` together if there are several, are right."""
    counts = {name: Accuracy.count(predictions) for name, predictions in sets.items()}
    if len(counts) > 1:
        counts["all"] = sum(counts.values(), Accuracy(0, 0))
    return counts


def write_summary(folder: Path, sets: Mapping[str, Sequence[Prediction]]) -> None:
    """Write the accuracy of each set to `summary.json` in a folder of predictions."""
    write_document(folder / SUMMARY, {name: each.dump() for name, each in count_accuracies(sets).items()})


def print_accuracies(sets: Mapping[str, Sequence[Prediction]]) -> None:
    """Print how many predictions of each set, and of all together, are right."""
    counts = count_accuracies(sets)
    width = max(map(len, counts), default=0)
    for name, accuracy in counts.items():
        print(f"{name:<{width}}  {accuracy}")


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
            if not scores or not all(map(isfinite, scores.values())) or label not in (None, *scores):
                raise ValueError("scores of no class, or a label that is none of them")
            yield Prediction(str(values["uid"]), label, scores)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            allowed = "an object with uid, label and scores, as mt task writes them"
            raise MtError(f"{path}:{number}", f"is no prediction ({err})", allowed) from err
